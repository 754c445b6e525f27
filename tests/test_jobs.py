"""Jobs: outputs in whole, nothing left behind, a forced run that trains, and the same bytes after any stop."""

import random
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

from modelstock import provenance
from modelstock.errors import TrackingError
from modelstock.params import TinyPretraining
from modelstock.tracking import mirror, times
from modelstock.tracking.history import read_history
from modelstock.tracking.tracker import TRACKERS, open_tracker
from modelstock.training import finetune, resume
from modelstock.training.finetune import finetune_seed, longer
from modelstock.training.inputs import Inputs
from modelstock.training.job import Job, Setting
from modelstock.training.loop import Run
from modelstock.training.periodic import merge_periodically
from modelstock.training.pretrain import pretrain_clip
from modelstock.weights.weight_set import load_weights
from tests.support.tracker import Recorder
from tests.support.training import EVERY_EPOCH, RECIPE, child, examples

KEEPS_ALL = RECIPE.model_copy(update={"snapshots": True})
PRETRAINING = TinyPretraining(
    source="shapes",
    seed=1,
    draws=64,
    batch_size=16,
    lr=1e-3,
    weight_decay=0.1,
    beta2=0.98,
    warmup_steps=1,
    clip_norm=1.0,
    precision="float32",
    log_every=1,
)


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """A project's folder, in which scratch/ is."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def steps(monkeypatch):
    """Every step that is taken from here on."""
    taken, step = [], Run._step
    monkeypatch.setattr(Run, "_step", lambda self, batch: (taken.append(self.step), step(self, batch)))
    return taken


@pytest.fixture(params=["finetune", "longer", "periodic", "pretrain"])
def stage(request, anchor):
    """What each training stage calls, as a function of the folder to write; and how many steps it takes."""
    inputs = Inputs(anchor=anchor, train=examples(), held_out=examples(), identities={"anchor": anchor.identity})
    seed = partial(finetune_seed, inputs, name="seed-0", setting=Setting())
    match request.param:
        case "finetune":
            return partial(seed, KEEPS_ALL, made_by={"stage": "finetune", "seed": 0}), 9
        case "longer":
            return partial(seed, longer(RECIPE, 2), made_by={"stage": "longer", "seed": 0, "factor": 2}), 18
        case "periodic":
            return partial(
                merge_periodically, inputs, RECIPE, EVERY_EPOCH, arm="test", seeds=[0, 1], setting=Setting()
            ), 18
        case _:
            return partial(pretrain_clip, PRETRAINING, threads=1), 4


def seed_0(anchor, out, *, setting=None, recipe=KEEPS_ALL):
    inputs = Inputs(anchor=anchor, train=examples(), held_out=examples(), identities={"anchor": anchor.identity})
    made_by = {"stage": "finetune", "seed": 0}
    return finetune_seed(inputs, recipe, name="seed-0", made_by=made_by, setting=setting or Setting(), out=out)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def left() -> list[Path]:
    """The files in scratch/ but for the times of trainings, a line each."""
    return [path for path in Path("scratch").rglob("*") if path.is_file() and path.parent != times.FOLDER]


def test_a_finished_job_leaves_nothing_and_run_again_it_trains_again_to_the_same_bytes(stage, steps):
    work, count = stage
    work(out=Path("first"))
    assert len(steps) == count
    assert left() == []
    work(out=Path("second"))
    assert len(steps) == 2 * count
    assert left() == []
    assert content(Path("second")) == content(Path("first"))


def test_a_job_writes_its_weights_averages_snapshots_and_history(anchor):
    seed_0(anchor, Path("out"))
    sets = {"weights", "ema-0.5", "ema-0.9", "lawa", "epoch-1", "epoch-2"}
    files = {f"{name}.safetensors" for name in sets}
    assert content(Path("out")).keys() == {"history.csv", "history.jsonl", *files}
    made = {name: load_weights(Path("out") / f"{name}.safetensors").meta["made_by"] for name in sets}
    assert made["epoch-2"]["average"] == "snapshot"
    assert made["epoch-2"]["options"]["epoch"] == 2
    assert [name for name in sets if "key" in made[name]] == ["weights"]
    assert [row["step"] for row in read_history(Path("out/history.jsonl"))] == list(range(1, 10))


class Stop(Exception):
    pass


def stop(*arguments, **options):
    raise Stop


def stop_after(function):
    def work(*arguments, **options):
        function(*arguments, **options)
        raise Stop

    return work


def stop_in_the_removal(path, ignore_errors=False):
    """shutil.rmtree that stops at what must be there."""
    if not ignore_errors:
        raise Stop


@pytest.mark.parametrize(
    ("place", "name", "work", "trained"),
    [
        (Job, "weight_set", stop, 0),
        (finetune, "link_or_copy", stop_after(finetune.link_or_copy), 0),
        (finetune, "write_history", stop_after(finetune.write_history), 0),
        (shutil, "rmtree", stop, 0),
        (shutil, "rmtree", stop_in_the_removal, 9),  # the resume point is gone, and the folder still there
    ],
    ids=["before the outputs", "between outputs", "after the outputs", "before the removal", "in the removal"],
)
def test_stopped_between_training_and_the_end_of_the_removal_a_job_ends_with_the_same_bytes(
    anchor, monkeypatch, steps, place, name, work, trained
):
    recipe = KEEPS_ALL if name != "weight_set" else RECIPE  # snapshots are weight sets made on the way
    seed_0(anchor, Path("whole"), recipe=recipe)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, work)
        with pytest.raises(Stop):
            seed_0(anchor, Path("out"), recipe=recipe)
    shutil.rmtree("out", ignore_errors=True)  # as DVC does before it runs a stage
    assert left() != []
    steps.clear()
    seed_0(anchor, Path("out"), recipe=recipe)
    assert len(steps) == trained
    assert content(Path("out")) == content(Path("whole"))
    assert left() == []


def test_kill_9_at_random_moments_of_a_job_changes_no_byte_of_its_outputs(anchor, monkeypatch):
    monkeypatch.setattr(resume, "SAVE_EVERY_S", -1.0)
    assert child(lambda: seed_0(anchor, Path("whole"))) == 0
    moments, kills, runs = random.Random(3), 0, 0
    while kills < 12:
        out, end = Path(f"killed-{runs}"), None
        while end != 0:
            shutil.rmtree(out, ignore_errors=True)
            end = child(lambda out=out: seed_0(anchor, out), moments.uniform(0.05, 0.9) if kills < 12 else None)
            assert end in (0, signal.SIGKILL)
            kills += end == signal.SIGKILL
        assert content(out) == content(Path("whole"))
        assert left() == []
        runs += 1


@pytest.mark.parametrize("change", ["nothing", "another torch", "another line of code", "more threads", "other data"])
def test_a_stopped_job_goes_on_only_with_the_code_libraries_threads_and_data_it_began_with(
    tmp_path, anchor, monkeypatch, steps, change
):
    monkeypatch.setattr(resume, "SAVE_EVERY_S", -1.0)
    with monkeypatch.context() as patch:
        save = resume.ResumePoint.save

        def save_until(self, run):
            save(self, run)
            if run.step == 4:
                raise Stop

        patch.setattr(resume.ResumePoint, "save", save_until)
        with pytest.raises(Stop):
            seed_0(anchor, Path("out"))
    steps.clear()
    if change == "another torch":
        version = provenance._version
        monkeypatch.setattr(provenance, "_version", lambda name: "9.0" if name == "torch" else version(name))
    elif change == "another line of code":
        changed, files_of = tmp_path / "loop.py", provenance.files_of
        loop = Path(finetune.__file__).with_name("loop.py")
        changed.write_text(loop.read_text() + "# another line\n")
        monkeypatch.setattr(provenance, "files_of", lambda m: [changed if f == loop else f for f in files_of(m)])
    identities = {"anchor": "other" if change == "other data" else anchor.identity}
    inputs = Inputs(anchor=anchor, train=examples(), held_out=examples(), identities=identities)
    finetune_seed(
        inputs,
        KEEPS_ALL,
        name="seed-0",
        made_by={"stage": "finetune", "seed": 0},
        setting=Setting(threads=2 if change == "more threads" else 1),
        out=Path("out"),
    )
    assert steps == list(range(4 if change == "nothing" else 0, 9))


# ---------------------------------------------------------------- tracked


def test_a_tracker_of_ones_own_follows_a_job_to_its_last_row(anchor, monkeypatch):
    monkeypatch.setitem(TRACKERS, "recorder", "tests.support.tracker:Recorder")
    monkeypatch.setattr(Recorder, "live_rows", {})
    monkeypatch.setattr(mirror, "AFTER_S", 0.0)
    seed_0(anchor, Path("out"), setting=Setting(tracker=partial(open_tracker, "recorder", Path.cwd(), "e")))
    assert Recorder.live_rows["seed-0"] == read_history(Path("out/history.jsonl"))
    assert left() == []


def test_a_trainings_times_are_kept_from_its_first_start_to_its_end_and_a_new_one_begins_anew():
    assert times.times_of("k") == times.Times()
    first = times.note_began("k").began
    stopped = times.note_began("k")  # it was stopped and goes on
    assert (stopped.began, stopped.ended) == (first, None)
    ended = times.note_ended("k")
    assert ended == times.times_of("k")
    assert ended.began == first <= ended.ended
    assert times.note_began("k").ended is None
    (times.FOLDER / "k.json").write_text("{")
    assert times.times_of("k") == times.Times()


def test_a_job_without_a_tracker_sends_nothing_and_an_unknown_tracker_is_refused():
    assert open_tracker("none", Path.cwd(), "e").live(key="k", name="n", params={}, history=Path("none")) is None
    with pytest.raises(
        TrackingError, match=r"tracking\.tracker: got mlfow; expected mlflow or none; did you mean mlflow"
    ):
        open_tracker("mlfow", Path.cwd(), "e")


def test_a_job_is_named_for_what_its_bytes_depend_on():
    def key(**changes):
        facts = {"made_by": {"stage": "finetune"}, "code": "modelstock.training.finetune", "facts": {"anchor": "a"}}
        return Job(name="seed-0", **{**facts, **changes}).key

    assert key() == key()
    others = [
        key(made_by={"stage": "longer"}),
        key(code="modelstock.training.periodic"),
        key(facts={"anchor": "b"}),
        key(setting=Setting(threads=2)),
    ]
    assert len({key(), *others}) == 5
    assert key(setting=Setting(workers=3)) == key()
