"""Periodic merging is merging by hand, bit for bit, in one process and under torchrun; and one seed over devices.

The runs are of 9 steps, 3 in an epoch: `every: 2 / 3` is every 2 steps.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

from modelstock.data.dataset import open_dataset
from modelstock.data.shapes.names import TINY_PREPROCESS
from modelstock.errors import ParamsError, TrainingError
from modelstock.experiment.rows import row_of
from modelstock.merging import engine, kernels
from modelstock.merging.methods.blend import Blend
from modelstock.merging.methods.rows import Option
from modelstock.merging.methods.span import uniform
from modelstock.merging.rules import RULES, Rule
from modelstock.models.towers import build_classifier, set_tensors, tensors_of
from modelstock.params import FinetuneParams, PeriodicParams, arm_section, load_params
from modelstock.tracking.history import read_history
from modelstock.training import periodic, resume
from modelstock.training.distributed import World, processes
from modelstock.training.inputs import read_inputs
from modelstock.training.parallel_merge import flat, give_back, merge_models, shares_of, spans_of
from modelstock.training.periodic import Periodic, merge_step, train_periodic
from modelstock.training.recipe import new_run
from modelstock.training.resume import Clock
from modelstock.weights.weight_set import WeightSet, load_weights
from tests.support.settings import full_params
from tests.support.splits import make_split
from tests.support.training import RECIPE, arm, equal, examples, keep, train, train_side_by_side

ROOT = Path(__file__).parent.parent

# ---------------------------------------------------------------- one merge


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("options", [{}, {"pairwise": "angle", "clip": "none"}])
def test_a_merge_of_models_is_the_merge_of_their_weight_sets_bit_for_bit_in_any_order(anchor, variants, count, options):
    chosen = variants[:count]
    expected, facts = engine.merge("model_stock", anchor, chosen, options=options)
    for order in (chosen, chosen[::-1]):
        models = [build_classifier(w) for w in order]
        report = merge_models(anchor, models, options=options)
        assert all(equal(tensors_of(model), expected.tensors) for model in models)
        assert report.keys() == facts.keys()
        for name, known in facts.items():
            assert {k: report[name][k] for k in ("norms", "cosine", "ratio", "flag")} == known


@pytest.mark.parametrize("count", [2, 3])
def test_warp_merges_two_by_slerp_and_more_by_their_karcher_mean(anchor, variants, count):
    method = {2: "nuslerp", 3: "karcher"}[count]
    expected, facts = engine.merge(method, anchor, by_norm(anchor, variants[:count]), options={"scale": 0.3})
    models = [build_classifier(w) for w in variants[:count]]
    report = merge_models(anchor, models, rule=RULES["warp"], options={"pull": 0.3, "toward": "anchor"})
    assert equal(tensors_of(models[0]), expected.tensors)
    assert report == facts


def test_what_a_model_keeps_of_its_own_is_a_straight_line_to_the_merge(anchor, variants):
    first, second = build_classifier(variants[0]), build_classifier(variants[1])
    own = flat(first)
    set_tensors(first, variants[1])
    give_back(first, own, 0.25)
    for name, tensor in tensors_of(first).items():
        line = 0.25 * variants[0].tensors[name].astype(float) + 0.75 * variants[1].tensors[name].astype(float)
        assert np.array_equal(tensor, line.astype(np.float32))
    give_back(first, own, 1.0)
    assert equal(tensors_of(first), variants[0].tensors)
    give_back(second, own, 0.0)
    assert equal(tensors_of(second), variants[1].tensors)


def test_a_tensor_that_no_seed_changed_keeps_the_anchors_values(anchor, variants):
    frozen = [WeightSet({**w.tensors, "head.bias": anchor.tensors["head.bias"]}, anchor.meta) for w in variants[:2]]
    models = [build_classifier(w) for w in frozen]
    report = merge_models(anchor, models)
    assert report["head.bias"]["flag"] == "zero"
    assert np.array_equal(tensors_of(models[0])["head.bias"], anchor.tensors["head.bias"])


def test_spans_are_the_runs_of_the_merge_kernels_and_processes_share_them_out_in_order(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 10)
    monkeypatch.setattr(kernels, "RUN", 20)
    spans = spans_of([3, 41, 1])
    expected = [(0, 0, 3), (1, 3, 23), (1, 23, 43), (1, 43, 44), (2, 44, 45)]
    assert [(span.tensor, span.start, span.stop) for span in spans] == expected
    for processes_ in (1, 2, 5):
        assert [span for share in shares_of(spans, processes_) for span in share] == spans
    values = [sum(span.stop - span.start for span in share) for share in shares_of(spans_of([10**4]), 2)]
    assert abs(values[0] - values[1]) <= 2 * 20


def test_a_merge_in_many_spans_is_still_that_of_the_engine(anchor, variants, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 1000)
    monkeypatch.setattr(kernels, "RUN", 3000)
    expected, _ = engine.merge("model_stock", anchor, variants)
    models = [build_classifier(w) for w in variants]
    merge_models(anchor, models)
    assert equal(tensors_of(models[0]), expected.tensors)


# ---------------------------------------------------------------- a run


def by_norm(anchor, tuned):
    """Weight sets in the order of their updates' norms, tensor by tensor: that in which a periodic merge sums them."""
    squares = {
        w.source: [float(np.sum((w.tensors[n].astype(float) - anchor.tensors[n]) ** 2)) for n in sorted(w.tensors)]
        for w in tuned
    }
    return sorted(tuned, key=lambda w: squares[w.source])


def by_hand(anchor, *, seeds=(0, 1), every=3, reset=False, method="model_stock", scale=1.0, kept=0.0, last=False):
    """Seeds trained one after the other to each merge, merged as files are, and sent on from there.

    `scale`: of the update from the anchor, or, with `last`, from the merge before. `kept`: the share of its own weights
    that each seed goes on with, but for the last merge.
    """
    runs = [new_run(build_classifier(anchor), examples(), RECIPE, preprocess=TINY_PREPROCESS, seed=s) for s in seeds]
    merged = origin = anchor
    for target in [*range(every, 9, every), 9]:
        for one in runs:
            one.train(until=target)
        tuned = [WeightSet(tensors_of(one.model), anchor.meta, str(s)) for one, s in zip(runs, seeds, strict=True)]
        merged, _ = engine.merge(method, origin, by_norm(origin, tuned), options={"scale": scale})
        origin = WeightSet(merged.tensors, anchor.meta) if last else anchor
        for one, own in zip(runs, tuned, strict=True):
            share = kept if target < 9 else 0
            pulled = {
                name: share * own.tensors[name].astype(float) + (1 - share) * tensor.astype(float)
                for name, tensor in merged.tensors.items()
            }
            set_tensors(one.model, WeightSet({n: t.astype(np.float32) for n, t in pulled.items()}, anchor.meta))
            if reset:
                one.optimizer.state.clear()
    return merged.tensors


@pytest.mark.parametrize(
    ("params", "how"),
    [
        ({}, {}),
        ({"every": 2 / 3}, {"every": 2}),
        ({"every": 4 / 3, "reset_moments": True}, {"every": 4, "reset": True}),
    ],
)
def test_a_periodic_run_is_seeds_trained_and_merged_by_hand(tmp_path, anchor, params, how):
    found, history, reports = train_side_by_side(anchor, tmp_path, merging=arm(**params))
    assert equal(found, by_hand(anchor, **how))
    merges = [row["step"] for row in history]
    every = how.get("every", 3)
    assert merges == [*range(every, 9, every), 9]
    assert list(reports) == [str(step) for step in merges]
    assert all(set(r) == set(anchor.tensors) for r in reports.values())
    assert 0 <= reports["9"]["visual.proj"]["ratio"] <= 1
    scored = [row["step"] for row in history if "validation/top1" in row]
    assert scored == {3: [3, 6, 9], 2: [4, 6, 9], 4: [4, 8, 9]}[every]


@pytest.mark.parametrize(
    ("rule", "params", "how"),
    [
        ("uniform", {}, {"method": "uniform"}),
        ("warp", {"pull": 1.0}, {"method": "nuslerp", "last": True}),
        ("warp", {"pull": 0.4, "toward": "anchor"}, {"method": "nuslerp", "scale": 0.4}),
        ("warp", {"pull": 0.4}, {"method": "nuslerp", "scale": 0.4, "last": True}),
        ("papa", {"alpha": 0.7, "every": 2 / 3}, {"method": "uniform", "kept": 0.7, "every": 2}),
    ],
)
def test_every_rule_is_training_and_merging_by_hand(tmp_path, anchor, rule, params, how):
    found, history, _ = train_side_by_side(anchor, tmp_path, merging=arm(rule, **params))
    assert equal(found, by_hand(anchor, **how))
    assert all("merge/cosine" in row and "merge/ratio" not in row for row in history)


def test_of_a_population_that_is_not_pulled_the_uniform_soup_is_left(tmp_path, anchor):
    alone, history, _ = train_side_by_side(anchor, tmp_path, merging=arm("papa", alpha=1.0, every=1 / 3))
    assert equal(alone, by_hand(anchor, method="uniform", every=9))
    assert len(history) == 9


def test_a_population_that_keeps_nothing_is_averaged(tmp_path, anchor):
    nothing = train_side_by_side(anchor, tmp_path / "papa", merging=arm("papa", alpha=0.0))
    assert equal(nothing[0], train_side_by_side(anchor, tmp_path / "uniform", merging=arm("uniform"))[0])


@pytest.mark.parametrize("toward", ["anchor", "last"])
def test_a_pull_of_nothing_gives_the_anchor_at_every_merge(tmp_path, anchor, toward, monkeypatch):
    measured = []
    monkeypatch.setattr(periodic, "accuracy", lambda model, *_: measured.append(tensors_of(model)) or 0.5)
    found, _, _ = train_side_by_side(anchor, tmp_path, merging=arm("warp", pull=0.0, toward=toward))
    assert len(measured) == 3
    assert all(equal(tensors, anchor.tensors) for tensors in (*measured, found))


def test_accuracy_on_the_way_is_that_of_the_merge_also_where_no_model_is_it(tmp_path, anchor, monkeypatch):
    measured = []
    monkeypatch.setattr(periodic, "accuracy", lambda model, *_: measured.append(tensors_of(model)) or 0.5)
    train_side_by_side(anchor, tmp_path, merging=arm("papa", alpha=1.0))
    runs = [new_run(build_classifier(anchor), examples(), RECIPE, preprocess=TINY_PREPROCESS, seed=s) for s in (0, 1)]
    for one in runs:
        one.train(until=3)
    soup, _ = engine.merge("uniform", anchor, [WeightSet(tensors_of(r.model), anchor.meta, r.name) for r in runs])
    assert equal(measured[0], soup.tensors)


@pytest.mark.parametrize("epoch", [1, 7, 23, 2502])
@pytest.mark.parametrize("every", [0.0004, 0.1, 1 / 3, 0.4348, 0.5, 1.0, 1.5, 2.0, 5.0])
def test_merges_come_at_the_step_nearest_to_their_epoch_and_never_twice_at_one(every, epoch):
    steps = [merge_step(number, every, epoch) for number in range(1, 200)]
    assert all(abs(step - number * every * epoch) <= 0.5 for number, step in enumerate(steps, 1))
    assert every * epoch < 1 or (steps[0] >= 1 and all(np.diff(steps) >= 1))


def test_half_an_epoch_of_23_steps_is_11_and_a_half():
    assert [merge_step(number, 0.5, 23) for number in (1, 2, 3, 4)] == [12, 23, 35, 46]
    assert [merge_step(number, 0.4348, 23) for number in (1, 2, 3)] == [10, 20, 30]


@pytest.mark.parametrize("epoch", [3, 7, 23, 2502])
def test_merges_less_than_a_step_apart_are_refused_with_a_period_that_is_taken(tmp_path, anchor, epoch, monkeypatch):
    monkeypatch.setattr(periodic, "steps_per_epoch", lambda *_: epoch)
    with pytest.raises(
        TrainingError, match=f"periodic.every: got 1e-06 epochs of {epoch} steps; expected a step"
    ) as error:
        train_side_by_side(anchor, tmp_path, merging=arm(every=1e-6))
    least = float(error.value.expected.split(", ")[1].split()[0])
    assert 1 <= least * epoch < 1.3


def test_one_merge_at_the_end_is_the_merge_of_seeds_trained_alone(tmp_path, anchor):
    found, history, _ = train_side_by_side(anchor, tmp_path, merging=arm(every=3.0))
    assert equal(found, by_hand(anchor, every=9))
    assert len(history) == 1


def test_a_new_rule_is_a_row(tmp_path, anchor, monkeypatch):
    def shortened(gram, *, by):
        return Blend(uniform(gram).coefficients / by, {"by": by})

    option = Option(name="by", default=4, about="divisor", low=1)
    row = Rule(name="shortened", function=shortened, formula="", source="", options=(option,))
    monkeypatch.setitem(RULES, "shortened", row)
    merging = arm_section(row)(rule="shortened", size=2)
    found, _, reports = train_side_by_side(anchor, tmp_path, merging=merging)
    assert equal(found, by_hand(anchor, method="uniform", scale=0.25))
    assert reports["3"]["visual.proj"]["by"] == 4


@pytest.mark.parametrize("rule", RULES)
def test_a_rules_options_are_not_called_as_anything_else_in_a_runs_settings(rule):
    options = {option.name for option in RULES[rule].options}
    assert not options & {*FinetuneParams.model_fields, *PeriodicParams.model_fields}
    assert {RULES[rule].kept, RULES[rule].toward} - {""} <= options


def test_moments_reset_and_moments_kept_end_elsewhere_and_so_do_no_merges(tmp_path, anchor):
    kept, _, _ = train_side_by_side(anchor, tmp_path / "kept")
    reset, _, _ = train_side_by_side(anchor, tmp_path / "reset", merging=arm(reset_moments=True))
    single, _, _ = train(anchor, tmp_path / "single")
    assert not equal(kept, reset)
    assert not equal(kept, single)


def test_three_seeds_and_loader_workers_change_nothing_in_the_rule(tmp_path, anchor):
    found, history, _ = train_side_by_side(anchor, tmp_path, seeds=(4, 0, 7), workers=1)
    assert equal(found, by_hand(anchor, seeds=(4, 0, 7)))
    assert {"loss/0", "loss/1", "loss/2"} <= history[-1].keys()


@pytest.mark.parametrize(
    ("merging", "stops"),
    [
        (arm(), (1, 4, 7, 8, 14)),
        (arm("papa", alpha=0.9, every=2 / 3), (5, 6, 13)),  # the models differ after a merge
        (arm("warp", pull=0.4), (7, 8, 14)),  # the next merge depends on the one before
    ],
)
def test_stopped_after_any_save_and_started_again_it_ends_with_the_same_bytes(
    tmp_path, anchor, monkeypatch, merging, stops
):
    expected = train_side_by_side(anchor, tmp_path / "whole", merging=merging)
    monkeypatch.setattr(resume, "SAVE_EVERY_S", -1.0)  # after every step of every seed, and after every merge
    save = Periodic.save
    for stop in stops:
        left = [stop]

        def until(self, left=left):
            save(self)
            left[0] -= 1
            if left[0] == 0:
                raise InterruptedError

        with monkeypatch.context() as patch:
            patch.setattr(Periodic, "save", until)
            with pytest.raises(InterruptedError):
                train_side_by_side(anchor, tmp_path / f"stop-{stop}", merging=merging)
        found = train_side_by_side(anchor, tmp_path / f"stop-{stop}", merging=merging)
        assert equal(found[0], expected[0])
        assert found[1:] == expected[1:]
        left = sorted(path.name for path in (tmp_path / f"stop-{stop}").glob("*.*.*"))
        assert len(left) == 2 * 3  # two seeds and a pointer each; older points than the last two are removed


def test_a_number_of_processes_that_fits_no_seeds_is_refused(tmp_path, anchor):
    with pytest.raises(TrainingError, match="got 3 processes for 2 seeds; expected 1, or one per seed"):
        train_side_by_side(anchor, tmp_path, world=World(0, 3))


def test_a_torchrun_of_another_size_and_a_device_that_is_not_there_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ParamsError, match="torchrun: got 3 processes; expected 2"), processes(2, "cpu", "none"):
        pass
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ParamsError, match="devices: got 2; expected at most the 1 GPUs"), processes(2, "auto", "none"):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ParamsError, match="device: got cuda; expected a device"), processes(1, "cuda", "none"):
        pass


# ---------------------------------------------------------------- real processes

KILLED = """
import random, signal, sys
from pathlib import Path
import torch
from tests.support.training import arm, child, keep, train_side_by_side
from modelstock.training import resume
from modelstock.weights.weight_set import load_weights
torch.set_num_threads(1)
resume.SAVE_EVERY_S = -1.0
anchor, out = load_weights(Path(sys.argv[1])), Path(sys.argv[2])

def train(folder):
    keep(folder, *train_side_by_side(anchor, folder, merging=arm("papa", alpha=0.9, every=2 / 3), epochs=6))

assert child(lambda: train(out / "whole")) == 0
moments, kills, runs = random.Random(0), 0, 0
while kills < 15:
    end = None
    while end != 0:
        end = child(lambda: train(out / f"killed-{runs}"), moments.uniform(0.02, 0.6) if kills < 15 else None)
        assert end in (0, signal.SIGKILL), end
        kills += end == signal.SIGKILL
    runs += 1
print(runs)
"""


def files(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("weights.safetensors", "results.json")]


def started(script: Path, text: str, *arguments: object, code: int = 0) -> str:
    """Run a script in a process of its own; returns what it printed."""
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=script.parent,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert (done.returncode == 0) == (code == 0), done.stderr[-3000:]
    return done.stdout


def test_kill_9_at_random_moments_changes_no_byte(tmp_path, anchor):
    anchor.save(tmp_path / "anchor.safetensors")
    runs = int(started(tmp_path / "killed.py", KILLED, tmp_path / "anchor.safetensors", tmp_path))
    for number in range(runs):
        assert files(tmp_path / f"killed-{number}") == files(tmp_path / "whole")


TWO = """
import os, signal, sys
from pathlib import Path
import torch
from tests.support.training import arm, keep, train, train_side_by_side
from modelstock.training import resume
from modelstock.training.distributed import processes
from modelstock.weights.weight_set import load_weights
from tests.support.settings import full_params

def main():
    with processes(2, "cpu", "two") as world:
        torch.set_num_threads(1)
        resume.SAVE_EVERY_S = -1.0
        anchor, out, what = load_weights(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
        if what == "killed" and world.rank == 0:  # dies between two steps, its fourth resume point just written
            save = resume.ResumePoint.save
            def die(self, run):
                save(self, run)
                if run.step == 4:
                    os.kill(os.getpid(), signal.SIGKILL)
            resume.ResumePoint.save = die
        for name in ("shared-killed", "shared-whole"):
            found = train(anchor, out / name, world=world, devices=2, mixup=0.3, micro_batch=2)
            if world.rank == 0:
                keep(out / name, *found[:2])
        for name in ("two", "resumed"):
            found = train_side_by_side(anchor, out / name, world=world)
            keep(out / (name + "-" + str(world.rank)), *found)
        for rule in ("papa", "warp"):
            found = train_side_by_side(anchor, out / rule, merging=arm(rule, every=2 / 3), world=world)
            keep(out / (rule + "-" + str(world.rank)), *found)

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory, anchor):
    """What two processes under torchrun made of both: periodic merging, one each, and one seed over both."""
    folder = tmp_path_factory.mktemp("two")
    anchor.save(folder / "anchor.safetensors")
    for name in ("two-0", "two-1", "resumed-0", "resumed-1", "papa-0", "papa-1", "warp-0", "warp-1"):
        (folder / name).mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep(folder_of(folder, "one"), *train_side_by_side(anchor, folder / "one"))
    for rule in ("papa", "warp"):
        results = train_side_by_side(anchor, folder / f"{rule}-one", merging=arm(rule, every=2 / 3))
        keep(folder_of(folder, f"{rule}-one"), *results)
    keep(folder_of(folder, "shared-one"), *train(anchor, folder / "shared-one", mixup=0.3)[:2])
    # A run of one process that stopped on its way, with saves at merges alone, for two processes to go on with.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "SAVE_EVERY_S", 1e9)
        patch.setattr(Periodic, "_merge", stop_at(6))
        patch.setattr(Clock, "due", lambda self: False)
        with pytest.raises(InterruptedError):
            train_side_by_side(anchor, folder / "resumed")
    torch.set_num_threads(threads)
    started(folder / "two.py", TWO, folder / "anchor.safetensors", folder, "killed", code=1)
    assert not (folder / "shared-whole").exists()
    started(folder / "two.py", TWO, folder / "anchor.safetensors", folder, "whole")
    return folder


def folder_of(folder: Path, name: str) -> Path:
    (folder / name).mkdir(exist_ok=True)
    return folder / name


def stop_at(step: int):
    """Periodic._merge that saves after each merge before `step`, and stops at it."""
    merge = Periodic._merge

    def stopping(self, target):
        if target == step:
            raise InterruptedError
        merge(self, target)
        self.save()

    return stopping


@pytest.mark.timeout(300)
def test_one_process_a_seed_under_torchrun_gives_the_bytes_of_one_process(two):
    assert files(two / "two-0") == files(two / "one")
    assert files(two / "two-1")[0] == files(two / "one")[0]


@pytest.mark.parametrize("rule", ["papa", "warp"])
def test_so_it_does_by_a_rule_after_which_models_differ_or_the_next_merge_starts_elsewhere(two, rule):
    assert files(two / f"{rule}-0") == files(two / f"{rule}-one")
    assert files(two / f"{rule}-1")[0] == files(two / f"{rule}-one")[0]


def test_what_one_process_left_unfinished_two_processes_finish_with_the_same_bytes(two):
    assert files(two / "resumed-0") == files(two / "one")


def test_one_seed_over_two_devices_takes_the_steps_of_one_device_up_to_rounding(two, anchor):
    (one, shared), (first, second) = (
        [load_weights(two / name / "weights.safetensors").tensors for name in ("shared-one", "shared-whole")],
        [json.loads((two / name / "results.json").read_text())[0] for name in ("shared-one", "shared-whole")],
    )
    for name, tensor in one.items():
        moved = np.linalg.norm(tensor - anchor.tensors[name])
        assert np.linalg.norm(shared[name] - tensor) < 0.05 * moved
    assert [row["step"] for row in first] == [row["step"] for row in second]
    assert [row["lr"] for row in first] == [row["lr"] for row in second]
    np.testing.assert_allclose([r["loss"] for r in first], [r["loss"] for r in second], rtol=1e-3)


def test_one_seed_over_two_devices_killed_and_started_again_gives_the_same_bytes(two):
    assert files(two / "shared-killed") == files(two / "shared-whole")


def test_the_stage_starts_a_process_a_seed_by_itself_and_gives_the_bytes_of_one_process(tmp_path, anchor):
    for name in ("train", "held-out"):
        make_split(tmp_path / "data" / name, name, 24)
    anchor.save(tmp_path / "anchor.safetensors")
    yaml = YAML(typ="safe")
    settings = yaml.load(full_params())
    settings |= {"threads": 1, "device": "cpu"}
    settings["finetune"] |= {"batch_size": 8, "epochs": 2, "warmup_steps": 2, "ema": [], "lawa": 0}
    settings["periodic"] = {"stock": dict(settings["periodic"]["model-stock"], devices=2)}
    with open(tmp_path / "params.yaml", "w") as file:
        yaml.dump(settings, file)
    done = subprocess.run(
        [sys.executable, "-m", "stages.periodic", "stock", "anchor.safetensors", "data/train", "data/held-out", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("periodic-stock/0-1: held-out accuracy") == 1
    params = load_params(tmp_path / "params.yaml")
    splits = (open_dataset(tmp_path / "data" / name) for name in ("train", "held-out"))
    inputs = read_inputs(anchor, *splits, in_memory=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, history, reports = train_periodic(
        inputs,
        params.finetune,
        params.periodic["stock"],
        seeds=[0, 1],
        folder=tmp_path / "one",
    )
    torch.set_num_threads(threads)
    found = load_weights(tmp_path / "out/weights.safetensors")
    assert equal(found.tensors, tensors_of(model))
    assert row_of(found).name == "periodic-stock/0-1"
    assert read_history(tmp_path / "out/history.jsonl") == history
    assert json.loads((tmp_path / "out/report.json").read_text()) == reports
