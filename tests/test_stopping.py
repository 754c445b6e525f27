"""Work that is asked to end saves and ends; run again, it ends with the bytes of work that was never asked."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

from modelstock.cli import app
from modelstock.data.dataset import open_dataset
from modelstock.errors import AskedToEnd
from modelstock.scoring import one_pass
from modelstock.tracking import mirror
from modelstock.tracking.history import read_history
from modelstock.tracking.times import times_of
from modelstock.training import resume
from modelstock.training.finetune import finetune_seed
from modelstock.training.inputs import Inputs
from modelstock.training.job import Setting
from modelstock.training.loop import Run
from tests.support.settings import full_params
from tests.support.splits import make_split
from tests.support.tracker import Recorder
from tests.support.training import RECIPE, arm, equal, examples, keep, train, train_side_by_side

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def saved_at_the_end_alone(monkeypatch):
    monkeypatch.setattr(resume, "SAVE_EVERY_S", 1e9)


@pytest.fixture
def request_file(tmp_path, monkeypatch) -> Path:
    file = tmp_path / "please end"
    monkeypatch.setenv("MODELSTOCK_STOP", str(file))
    return file


@pytest.fixture
def steps(monkeypatch, request_file):
    """The steps that are taken from here on, by name of the run; `steps.asked_at`: after how many the request comes."""

    class Steps(list):
        asked_at = 0

    taken, step = Steps(), Run._step

    def counted(self, batch):
        taken.append((self.name, self.step))
        step(self, batch)
        if len(taken) == taken.asked_at:
            request_file.touch()

    monkeypatch.setattr(Run, "_step", counted)
    return taken


# ---------------------------------------------------------------- one process


@pytest.mark.parametrize("count", [1, 4, 8])
def test_a_seed_that_is_asked_saves_after_the_current_step_and_goes_on_to_the_same_bytes(
    tmp_path, anchor, steps, request_file, count
):
    expected, history, averages = train(anchor, tmp_path / "whole")
    assert len(steps) == 9
    steps.clear()
    steps.asked_at = count
    with pytest.raises(AskedToEnd) as caught:
        train(anchor, tmp_path / "asked")
    assert str(caught.value) == f"asked to end: saved at step {count} of 9; run it again to go on"
    assert [row["step"] for row in read_history(tmp_path / "asked/history.jsonl")] == list(range(1, count + 1))
    request_file.unlink()
    found, again, averages_again = train(anchor, tmp_path / "asked")
    assert steps == [("seed-0", step) for step in range(9)]  # none of them twice
    assert equal(found, expected)
    assert again == history
    assert all(equal(averages_again[name], averages[name]) for name in averages)
    assert (tmp_path / "asked/history.jsonl").read_bytes() == (tmp_path / "whole/history.jsonl").read_bytes()


def test_a_seed_that_finds_the_request_at_every_start_gets_on_by_a_step_each_time(
    tmp_path, anchor, steps, request_file
):
    expected, history, _ = train(anchor, tmp_path / "whole")
    request_file.touch()
    for step in range(1, 9):
        with pytest.raises(AskedToEnd, match=f"saved at step {step} of 9"):
            train(anchor, tmp_path / "asked")
    found, again, _ = train(anchor, tmp_path / "asked")  # after the last step nothing is left but to write
    assert equal(found, expected)
    assert again == history


@pytest.mark.parametrize("count", [1, 3, 5, 6, 11, 18])
@pytest.mark.parametrize("rule", ["model_stock", "warp"])
def test_seeds_that_take_turns_are_saved_wherever_they_are(tmp_path, anchor, steps, request_file, rule, count):
    merging = arm(rule, every=1.0)  # three merges of two seeds, three steps each
    whole = train_side_by_side(anchor, tmp_path / "whole", merging=merging)
    assert len(steps) == 18
    steps.clear()
    steps.asked_at = count
    with pytest.raises(AskedToEnd, match=r"^asked to end: saved at step \d, \d of 9; run it again to go on$"):
        train_side_by_side(anchor, tmp_path / "asked", merging=merging)
    request_file.unlink()
    found = train_side_by_side(anchor, tmp_path / "asked", merging=merging)
    assert len(steps) == len(set(steps)) == 18
    assert equal(found[0], whole[0])
    assert found[1:] == whole[1:]
    assert (tmp_path / "asked/history.jsonl").read_bytes() == (tmp_path / "whole/history.jsonl").read_bytes()


def test_a_variable_that_is_empty_or_names_nothing_asks_for_nothing(tmp_path, anchor, monkeypatch, request_file):
    train(anchor, tmp_path / "absent")
    request_file.touch()
    monkeypatch.setenv("MODELSTOCK_STOP", "")
    train(anchor, tmp_path / "empty")


def test_history_times_and_mirror_of_a_job_that_was_asked_are_whole(tmp_path, anchor, monkeypatch, steps, request_file):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mirror, "AFTER_S", 0.0)
    monkeypatch.setattr(Recorder, "live_rows", {})
    keys = []
    note = mirror.note_began
    monkeypatch.setattr(mirror, "note_began", lambda key: (keys.append(key), note(key))[1])
    inputs = Inputs(anchor=anchor, train=examples(), held_out=examples(), identities={})
    work = partial(
        finetune_seed,
        inputs,
        RECIPE,
        name="seed-0",
        made_by={"stage": "finetune", "seed": 0},
        setting=Setting(tracker=lambda: Recorder(tmp_path, "e")),
    )
    work(out=Path("whole"))
    whole = Recorder.live_rows.pop("seed-0")
    (tmp_path / "scratch/times" / f"{keys[0]}.json").unlink()
    steps.clear()
    steps.asked_at = 5
    with pytest.raises(AskedToEnd):
        work(out=Path("asked"))
    began = times_of(keys[0])
    assert Recorder.live_rows["seed-0"] == whole[:5]
    assert began.began
    assert began.ended is None  # to be gone on with
    assert not Path("asked").exists()
    request_file.unlink()
    work(out=Path("asked"))
    assert Recorder.live_rows["seed-0"] == whole == read_history(Path("asked/history.jsonl"))
    assert times_of(keys[0]).began == began.began
    assert times_of(keys[0]).ended
    assert {p.name: p.read_bytes() for p in Path("asked").iterdir()} == {
        p.name: p.read_bytes() for p in Path("whole").iterdir()
    }


# ---------------------------------------------------------------- scoring


@pytest.fixture
def scored(monkeypatch):
    """The numbers of the batches that are decoded."""
    numbers, read = [], one_pass.DecodedBatches.__getitem__
    monkeypatch.setattr(
        one_pass.DecodedBatches, "__getitem__", lambda self, number: (numbers.append(number), read(self, number))[1]
    )
    return numbers


@pytest.mark.parametrize("resident", [1, 3])
def test_a_pass_that_is_asked_ends_after_a_span_and_scores_nothing_twice(
    tmp_path, variants, monkeypatch, request_file, scored, resident
):
    make_split(tmp_path / "data", "shapes", 130)
    monkeypatch.setattr(one_pass, "SPAN_BYTES", 40 * 32 * 32 * 3)  # where weight sets take turns: two batches
    span = 20 if resident == 3 else 40
    data, ensembles = open_dataset(tmp_path / "data"), [[w.identity for w in variants]]
    options = one_pass.ScoringOptions(batch_size=20, resident=resident)
    expected = one_pass.score(data, variants, ensembles, options)
    scored.clear()
    cached = one_pass.ScoringOptions(batch_size=20, resident=resident, cache=tmp_path / "cache")
    request_file.touch()
    with pytest.raises(AskedToEnd, match=f"^asked to end: saved after {span} of 130 examples; run it again to go on$"):
        one_pass.score(data, variants, ensembles, cached)
    with pytest.raises(AskedToEnd, match=f"saved after {2 * span} of 130 examples"):
        one_pass.score(data, variants, ensembles, cached)
    request_file.unlink()
    found = one_pass.score(data, variants, ensembles, cached)
    assert sorted(scored) == list(range(7))
    for identity, outcome in expected.items():
        for column in one_pass.COLUMNS:
            np.testing.assert_array_equal(getattr(found[identity], column), getattr(outcome, column))


def test_a_pass_that_keeps_nothing_cannot_go_on_later_and_is_finished(tmp_path, variants, request_file):
    make_split(tmp_path / "data", "shapes", 60)
    request_file.touch()
    options = one_pass.ScoringOptions(batch_size=20)
    (outcome,) = one_pass.score(open_dataset(tmp_path / "data"), variants[:1], options=options).values()
    assert len(outcome) == 60


def test_the_command_ends_with_a_line_and_its_exit_code(monkeypatch, capsys):
    def asked():
        raise AskedToEnd("after 500 of 1,000 examples")

    monkeypatch.setattr(app, "app", asked)
    monkeypatch.setattr(sys, "argv", ["modelstock", "evaluate", "weights.safetensors"])
    with pytest.raises(SystemExit) as caught:
        app.main()
    assert caught.value.code == os.EX_TEMPFAIL == 75
    line = "modelstock evaluate: asked to end: saved after 500 of 1,000 examples; run it again to go on\n"
    assert capsys.readouterr().err == line


# ---------------------------------------------------------------- stages, and several processes


@pytest.fixture(scope="module")
def project(tmp_path_factory, anchor) -> Path:
    """A folder with small params, data and an anchor, for stages of one process and of two."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("train", "held-out"):
        make_split(folder / "data" / name, name, 24)
    anchor.save(folder / "anchor.safetensors")
    yaml = YAML(typ="safe")
    settings = yaml.load(full_params())
    settings |= {"threads": 1, "device": "cpu"}
    settings["finetune"] |= {"batch_size": 8, "epochs": 2, "warmup_steps": 2, "ema": [0.5], "lawa": 2}
    settings["periodic"] = {"stock": dict(settings["periodic"]["model-stock"], devices=2)}
    for devices in (1, 2):
        settings["finetune"]["devices"] = devices
        with open(folder / f"params-{devices}.yaml", "w") as file:
            yaml.dump(settings, file)
    return folder


def stage(folder: Path, words: str, request: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)} | ({"MODELSTOCK_STOP": str(request)} if request else {})
    command = [sys.executable, "-m", *words.split()]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("words", "devices", "name"),
    [
        ("stages.finetune 0 anchor.safetensors data/train data/held-out", 1, "finetune 0"),
        ("stages.finetune 0 anchor.safetensors data/train data/held-out", 2, "finetune 0"),
        ("stages.periodic stock anchor.safetensors data/train data/held-out", 2, "periodic stock"),
    ],
)
def test_a_stage_that_is_asked_ends_with_a_line_and_its_exit_code_and_goes_on(project, tmp_path, words, devices, name):
    (project / "params.yaml").write_bytes((project / f"params-{devices}.yaml").read_bytes())
    whole = stage(project, f"{words} {tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    request = tmp_path / "please end"
    request.touch()
    asked = stage(project, f"{words} {tmp_path}/asked", request)
    assert asked.returncode == os.EX_TEMPFAIL, asked.stderr[-3000:]
    lines = [line for line in asked.stderr.splitlines() if "asked to end" in line]
    assert lines == [f"{name}: asked to end: saved at step 1 of 6; run it again to go on"]
    assert "Traceback" not in asked.stderr
    assert not (tmp_path / "asked").exists()
    request.unlink()
    again = stage(project, f"{words} {tmp_path}/asked", request)
    assert again.returncode == 0, again.stderr[-3000:]
    assert {p.name: p.read_bytes() for p in (tmp_path / "asked").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }


# Only one of the processes finds the request: the other is on its way to the merge, or at it.
ONE_ASKED = """
import os, sys
from pathlib import Path
import torch
from modelstock.errors import AskedToEnd
from modelstock.training import resume
from modelstock.training.distributed import processes
from modelstock.weights.weight_set import load_weights
from tests.support.training import keep, train_side_by_side

def main():
    with processes(2, "cpu", "one_asked") as world:
        torch.set_num_threads(1)
        resume.SAVE_EVERY_S = 1e9
        anchor, out = load_weights(Path(sys.argv[1])), Path(sys.argv[2])
        for asked in (0, 1):
            if world.rank == asked:
                os.environ["MODELSTOCK_STOP"] = sys.argv[1]
            try:
                train_side_by_side(anchor, out / f"asked-{asked}", world=world)
            except AskedToEnd as error:
                (out / f"asked-{asked}-{world.rank}.txt").write_text(str(error))
            os.environ.pop("MODELSTOCK_STOP", None)
            world.barrier()
        found = train_side_by_side(anchor, out / "asked-0", world=world)
        if world.rank == 0:
            keep(out / "asked-0", *found)

if __name__ == "__main__":
    main()
"""


@pytest.mark.timeout(300)
def test_where_one_process_alone_finds_the_request_all_save_and_any_number_of_processes_goes_on(tmp_path, anchor):
    anchor.save(tmp_path / "anchor.safetensors")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (tmp_path / "whole").mkdir()
    keep(tmp_path / "whole", *train_side_by_side(anchor, tmp_path / "whole"))
    script = tmp_path / "one_asked.py"
    script.write_text(ONE_ASKED)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(script), str(tmp_path / "anchor.safetensors"), str(tmp_path)),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    saved = {path.stem: path.read_text().split(": ")[1] for path in tmp_path.glob("asked-*.txt")}
    one, three = (f"saved at step {step} of 9; run it again to go on" for step in (1, 3))
    assert saved == {"asked-0-0": one, "asked-0-1": three, "asked-1-0": three, "asked-1-1": one}
    (tmp_path / "one process").mkdir()
    keep(tmp_path / "one process", *train_side_by_side(anchor, tmp_path / "asked-1"))
    torch.set_num_threads(threads)
    for name in ("weights.safetensors", "results.json"):
        expected = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "asked-0" / name).read_bytes() == expected  # two processes went on
        assert (tmp_path / "one process" / name).read_bytes() == expected
    assert len(json.loads((tmp_path / "whole/results.json").read_text())) == 2
