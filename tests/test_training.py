"""Training: the schedule by hand, averages against their formulas, and runs that resume bit for bit after kill -9."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from modelstock.data.shapes.names import TINY_PREPROCESS
from modelstock.errors import TrainingError
from modelstock.models.towers import Classifier, build_classifier, tensors_of
from modelstock.params import FinetuneParams
from modelstock.training import resume
from modelstock.training.callbacks import Ema, Lawa
from modelstock.training.finetune import finetune
from modelstock.training.loop import Callback, Run, learning_rate
from modelstock.training.pretrain import shared_positives_loss
from modelstock.training.recipe import CrossEntropy, examples_of, new_run, parameter_groups, schedule_of
from modelstock.training.resume import Clock, ResumePoint, read_state
from modelstock.training.validation import top1
from modelstock.weights.weight_set import WeightSet
from tests.support.training import RECIPE, dropping, equal, examples, train

ROOT = Path(__file__).parent.parent


def point(folder: Path) -> dict:
    """The last resume point of seed 0 in its folder."""
    return read_state(folder / "state.pt", of=f"{folder.name}/seed-0")


def test_the_schedule_by_hand():
    rates = [learning_rate(s, peak=1.0, warmup=2, steps=6) for s in range(7)]
    np.testing.assert_allclose(rates, [0.5, 1.0, 1.0, 0.5 + 0.25 * 2**0.5, 0.5, 0.5 - 0.25 * 2**0.5, 0], atol=1e-12)


def test_shared_positives_loss_equals_plain_contrast_where_classes_differ_and_its_floor_where_they_agree():
    image, text = (functional.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    scale = torch.tensor(7.0)
    logits, own = scale * image @ text.T, torch.arange(5)
    plain = (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(shared_positives_loss(image, text, own, scale), plain)
    same = torch.zeros(5, dtype=torch.long)
    flat = image[:1].repeat(5, 1)
    torch.testing.assert_close(shared_positives_loss(flat, flat, same, scale), torch.tensor(5.0).log())


def test_top1_by_hand():
    images = torch.eye(3).reshape(3, 1, 1, 3)
    batches = [(images[:2], torch.tensor([0, 1])), (images[2:], torch.tensor([0]))]
    assert top1(nn.Flatten(), batches, torch.device("cpu")) == pytest.approx(2 / 3)


# ---------------------------------------------------------------- one seed


def test_a_seed_trained_twice_gives_the_same_bytes_and_another_seed_others(tmp_path, anchor):
    first, history, averages = train(anchor, tmp_path / "a")
    second, again, averages_again = train(anchor, tmp_path / "b")
    other, _, _ = train(anchor, tmp_path / "c", seed=1)
    assert equal(first, second)
    assert all(equal(averages[name], averages_again[name]) for name in averages)
    assert history == again
    assert not np.array_equal(first["head.weight"], other["head.weight"])
    assert [row["step"] for row in history] == list(range(1, 10))
    assert [row["step"] for row in history if "validation/top1" in row] == [3, 6, 9]
    assert history[-1]["loss"] < history[0]["loss"]


def test_validation_every_two_epochs_measures_the_last_one_too(tmp_path, anchor):
    trained, history, _ = train(anchor, tmp_path / "a", validate_every=2)
    assert [row["step"] for row in history if "validation/top1" in row] == [6, 9]
    assert equal(trained, train(anchor, tmp_path / "b")[0])


class Watch(Callback):
    """The weights before the first step and after every step."""

    def __init__(self):
        self.seen = []

    def before_step(self, run):
        if not self.seen:
            self.after_step(run)

    def after_step(self, run):
        self.seen.append({k: v.double().clone() for k, v in run.model.state_dict().items()})


def test_ema_and_lawa_are_their_formulas_over_the_weights_of_every_step(anchor):
    model, watch = build_classifier(anchor), Watch()
    ema, lawa = Ema(0.75, model), Lawa(2, 3, 9)
    new_run(model, examples(), RECIPE, preprocess=TINY_PREPROCESS, seed=0, callbacks=[watch, ema, lawa]).train()
    assert len(watch.seen) == 1 + 9
    for name, found in ema.tensors().items():
        # e_9 = 0.75^9 w_0 + sum_s 0.25 * 0.75^(9-s) w_s
        expected = 0.75**9 * watch.seen[0][name]
        expected += sum(0.25 * 0.75 ** (9 - s) * watch.seen[s][name] for s in range(1, 10))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        # The last two epochs end after steps 6 and 9.
        mean = ((watch.seen[6][name] + watch.seen[9][name]) / 2).float()
        assert torch.equal(lawa.tensors()[name], mean)
    moved = ema.tensors()["head.weight"].double()
    assert (moved - watch.seen[9]["head.weight"]).norm() > 1e-4


def test_snapshots_are_the_weights_at_the_ends_of_all_epochs_but_the_last(tmp_path, anchor):
    model, kept = build_classifier(anchor), {}
    finetune(
        model,
        examples(),
        examples(),
        recipe=RECIPE,
        preprocess=TINY_PREPROCESS,
        seed=0,
        folder=tmp_path,
        snapshot=lambda epoch: kept.__setitem__(epoch, tensors_of(model)),
    )
    short, watch = build_classifier(anchor), Watch()
    new_run(short, examples(), RECIPE, preprocess=TINY_PREPROCESS, seed=0, callbacks=[watch]).train(until=6)
    assert kept.keys() == {1, 2}
    for epoch, step in ((1, 3), (2, 6)):
        assert all(np.array_equal(kept[epoch][k], v.float().numpy()) for k, v in watch.seen[step].items())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixup": 0.4, "rand_augment_operations": 2, "flip": True, "micro_batch": 3, "label_smoothing": 0.1},
        {"precision": "float16"},
        {"head_first_epochs": 1, "layer_decay": 0.6, "decay": "matrices", "gradient_checkpointing": True},
    ],
)
def test_a_run_stopped_after_any_step_and_started_again_gives_the_same_bytes(tmp_path, anchor, monkeypatch, changes):
    start = dropping(anchor)
    expected, history, averages = train(start, tmp_path / "whole", **changes)
    monkeypatch.setattr(resume, "SAVE_EVERY_S", -1.0)  # after every step
    for stop in (1, 4, 8):
        with monkeypatch.context() as patch:
            save = ResumePoint.save

            def until(self, run, save=save, stop=stop):
                save(self, run)
                if run.step == stop:
                    raise InterruptedError

            patch.setattr(ResumePoint, "save", until)
            with pytest.raises(InterruptedError):
                train(start, tmp_path / f"stop-{stop}", **changes)
        found, again, averages_again = train(start, tmp_path / f"stop-{stop}", **changes)
        assert again == history
        assert equal(found, expected)
        assert all(equal(averages_again[name], averages[name]) for name in averages)


def test_a_loss_that_is_not_finite_stops_the_run_with_step_rate_and_resume_point(tmp_path, anchor):
    bad = WeightSet({**anchor.tensors, "head.bias": np.full(24, np.nan, np.float32)}, anchor.meta)
    with pytest.raises(TrainingError, match=r"seed-0, step 0: got loss nan, .* at learning rate .*point is step 0"):
        train(bad, tmp_path)


def test_fewer_examples_than_a_batch_are_refused(tmp_path, anchor):
    with pytest.raises(TrainingError, match=r"finetune\.batch_size: got 8; expected at most the 4 training examples"):
        train(anchor, tmp_path, data=examples(4))


def test_resume_points_take_two_percent_of_the_time_at_most(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(resume.time, "monotonic", lambda: now[0])
    clock = Clock()
    for cost, wait in ((0.1, 20), (1.0, 50), (30.0, 1500)):
        clock.time(lambda cost=cost: now.__setitem__(0, now[0] + cost))
        now[0] += wait
        assert not clock.due()
        now[0] += 0.01
        assert clock.due()


SCRIPT = """
import json, os, random, signal, sys
from pathlib import Path
import torch
from tests.support.training import RECIPE, child, dropping, examples
from modelstock.training import resume
from modelstock.training.finetune import finetune
from modelstock.models.towers import build_classifier, tensors_of
from modelstock.data.shapes.names import TINY_PREPROCESS
from modelstock.weights.weight_set import WeightSet, load_weights
torch.set_num_threads(1)
resume.SAVE_EVERY_S = -1.0
anchor, out, workers = dropping(load_weights(Path(sys.argv[1]))), Path(sys.argv[2]), int(sys.argv[3])
recipe = RECIPE.model_copy(update={"epochs": 14, "mixup": 0.2})

def train(folder, dies_in_save=None):
    if dies_in_save is not None:  # half a resume point is on the disk when the process dies
        real, left = torch.save, [dies_in_save]
        def save(state, file):
            real(state, file)
            left[0] -= 1
            if left[0] < 0:
                file.flush()
                temporary = next(folder.glob(".next.pt.*.tmp"))
                os.truncate(temporary, temporary.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        torch.save = save
    model = build_classifier(anchor)
    history, averages = finetune(
        model, examples(), examples(), recipe=recipe, preprocess=TINY_PREPROCESS, seed=0, folder=folder,
        workers=workers)
    sets = {a.name: {k: v.numpy() for k, v in a.tensors().items()} for a in averages}
    for name, tensors in [*sets.items(), ("weights", tensors_of(model))]:
        WeightSet(tensors, {"history": history}).save(folder / f"{name}.safetensors")

assert child(lambda: train(out / "whole")) == 0
moments, wanted = random.Random(workers), int(sys.argv[4])
kills, runs = 0, 0
while kills < wanted:
    folder, end = out / f"killed-{runs}", None
    while end != 0:  # killed and started again, until it is through
        if moments.random() < 0.2:
            saves = moments.randrange(3)
            end = child(lambda: train(folder, saves))
        else:
            end = child(lambda: train(folder), moments.uniform(0.02, 0.5) if kills < wanted else None)
        assert end in (0, signal.SIGKILL), end
        kills += end == signal.SIGKILL
    runs += 1
print(json.dumps([kills, runs]))
"""


@pytest.mark.parametrize(("workers", "wanted"), [(0, 25), (2, 10)])
def test_kill_9_at_random_moments_also_during_a_save_changes_no_byte(tmp_path, anchor, workers, wanted):
    anchor.save(tmp_path / "anchor.safetensors")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "anchor.safetensors"), str(tmp_path), str(workers), str(wanted)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills, runs = json.loads(done.stdout)
    assert kills >= wanted
    for number in range(runs):
        folders = tmp_path / "whole", tmp_path / f"killed-{number}"
        for name in (
            "weights.safetensors",
            "ema-0.5.safetensors",
            "ema-0.9.safetensors",
            "lawa.safetensors",
            "history.jsonl",
        ):
            whole, killed = ((folder / name).read_bytes() for folder in folders)
            assert whole == killed
        whole, killed = (point(folder)["optimizer"]["state"] for folder in folders)
        assert len(whole) == len(killed) == len(anchor.tensors)
        assert all(torch.equal(whole[n][k], killed[n][k]) for n in whole for k in whole[n])


# ---------------------------------------------------------------- the recipe


def test_a_worker_whose_trainer_was_killed_as_it_began_does_not_wait_for_ever(tmp_path):
    script = """
import os, signal, sys
from torch.utils.data import DataLoader
from modelstock.workers import follow_parent

def killed_just_before(number):  # when torch's own watchdog has not looked yet
    os.kill(os.getppid(), signal.SIGKILL)
    while os.getppid() == trainer:
        pass
    print(os.getpid(), flush=True)
    follow_parent(number)

trainer = os.getpid()
next(iter(DataLoader(range(4), num_workers=1, worker_init_fn=killed_just_before)))
"""
    (tmp_path / "script.py").write_text(script)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        said, _ = process.communicate(timeout=60)  # the worker holds the other end of the pipe while it lives
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert int(said) > 0


def test_a_batch_in_micro_batches_has_the_gradients_of_the_whole(anchor):
    def gradients(micro_batch):
        model = build_classifier(anchor)
        recipe = RECIPE.model_copy(update={"micro_batch": micro_batch})
        new_run(model, examples(), recipe, preprocess=TINY_PREPROCESS, seed=0).train(until=1)
        return {k: p.grad for k, p in model.named_parameters()}

    whole = gradients(None)
    for size in (3, 1):
        for name, gradient in gradients(size).items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-7)


def needs_memory_for(limit: int, monkeypatch) -> list[int]:
    """Have the device refuse more than `limit` examples at a time, as its allocator would; returns what was tried."""
    tried = []
    forward = Classifier.forward

    def refuse(self, images):
        tried.append(len(images))
        if self.training and len(images) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return forward(self, images)

    monkeypatch.setattr(Classifier, "forward", refuse)
    return tried


def test_auto_finds_the_largest_half_that_fits_and_ends_with_the_bytes_of_that_micro_batch(
    tmp_path, anchor, monkeypatch
):
    start = dropping(anchor)
    expected, history, _ = train(start, tmp_path / "named", micro_batch=2)
    tried = needs_memory_for(3, monkeypatch)
    found, again, _ = train(start, tmp_path / "auto", micro_batch="auto")
    assert tried[:3] == [8, 4, 2]
    assert tried.count(8) == 1
    assert again == history
    assert equal(found, expected)
    assert point(tmp_path / "auto")["micro_batch"] == 2


def test_out_of_memory_says_what_to_change(tmp_path, anchor, monkeypatch):
    needs_memory_for(3, monkeypatch)
    with pytest.raises(TrainingError, match=r"step 0: got not enough memory for 8 .* set micro_batch to 4 or auto"):
        train(anchor, tmp_path / "whole")
    needs_memory_for(0, monkeypatch)
    with pytest.raises(TrainingError, match="not enough memory for 1 examples"):
        train(anchor, tmp_path / "auto", micro_batch="auto")


def test_gradient_checkpointing_changes_no_byte(tmp_path, anchor):
    plain, _, _ = train(anchor, tmp_path / "plain")
    assert equal(train(anchor, tmp_path / "checkpointing", gradient_checkpointing=True)[0], plain)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_trains_like_float32_and_keeps_float32_weights(tmp_path, anchor, precision):
    full, history, _ = train(anchor, tmp_path / "full")
    lower, again, _ = train(anchor, tmp_path / "lower", precision=precision)
    assert not equal(lower, full)
    assert all(v.dtype == np.float32 for v in lower.values())
    assert again[-1]["loss"] == pytest.approx(history[-1]["loss"], rel=0.05)
    assert ("loss_scale" in again[-1]) == (precision == "float16")


def test_a_gradient_that_overflows_float16_lowers_the_scale_and_is_no_step(tmp_path, anchor):
    model = build_classifier(anchor)
    recipe = RECIPE.model_copy(update={"precision": "float16"})
    run = new_run(model, examples(), recipe, preprocess=TINY_PREPROCESS, seed=0)
    run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 2.0**40})
    run.train(until=1)
    assert equal(tensors_of(model), anchor.tensors)
    assert run.last["loss_scale"] == 2.0**39
    assert "grad_norm" not in run.last


def test_the_head_learns_first_and_the_tower_only_after_it_at_its_own_schedule(anchor):
    recipe = RECIPE.model_copy(update={"head_first_epochs": 2, "head_lr": 0.01})
    model, watch = build_classifier(anchor), Watch()
    run = new_run(model, examples(), recipe, preprocess=TINY_PREPROCESS, seed=0, callbacks=[watch])
    assert run.steps == 5 * 3
    run.train(until=8)
    for name, start in watch.seen[0].items():
        assert torch.equal(watch.seen[6][name], start) == name.startswith("visual.")
        assert not torch.equal(watch.seen[8][name], start)
    rate = schedule_of(recipe, 3)
    assert [rate(s) for s in (0, 1, 6, 7)] == pytest.approx([0.005, 0.01, 0.0005, 0.001])
    assert rate(15) == pytest.approx(0)


def test_a_constant_schedule_stays_at_its_peak_after_the_warm_up():
    recipe = RECIPE.model_copy(update={"schedule": "constant"})
    rate = schedule_of(recipe, 3)
    last = 3 * recipe.epochs - 1
    warm_up = [recipe.lr * (step + 1) / recipe.warmup_steps for step in range(recipe.warmup_steps)]
    assert [rate(step) for step in range(recipe.warmup_steps)] == pytest.approx(warm_up)
    assert rate(recipe.warmup_steps) == rate(last) == recipe.lr
    assert schedule_of(RECIPE, 3)(last) < recipe.lr / 2


def test_a_share_of_the_examples_is_drawn_by_the_seed_and_nothing_else_is_seen():
    whole = examples()
    half = {seed: examples_of(whole, RECIPE.model_copy(update={"share": 0.5}), seed) for seed in (0, 1)}
    for part in half.values():
        assert len(part.labels) == round(0.5 * len(whole.labels))
        pictures = [whole.image(row).tobytes() for row in range(len(whole.labels))]
        rows = [pictures.index(part.image(row).tobytes()) for row in range(len(part.labels))]
        assert len(set(rows)) == len(rows)
        assert [whole.labels[row] for row in rows] == part.labels.tolist()
        assert part.size(0) == whole.size(rows[0])
    assert [half[0].image(row).tobytes() for row in range(9)] != [half[1].image(row).tobytes() for row in range(9)]
    assert examples_of(whole, RECIPE, 0) is whole


def test_a_frozen_head_stays_the_anchors(tmp_path, anchor):
    found, _, _ = train(anchor, tmp_path, train_head=False)
    assert all(np.array_equal(found[k], anchor.tensors[k]) == k.startswith("head.") for k in found)


def test_layer_decay_by_hand(anchor):
    model = build_classifier(anchor)
    groups = parameter_groups(model, layer_decay=0.5, weight_decay=0.1, decay="matrices")
    found = {id(p): (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == len(anchor.tensors)
    assert found[id(model.head.weight)] == (1.0, 0.1)
    assert found[id(model.head.bias)] == (1.0, 0.0)
    assert found[id(model.visual.conv1.weight)] == (0.5**5, 0.1)
    assert found[id(model.visual.transformer.resblocks[3].mlp.c_fc.bias)] == (0.5, 0.0)
    assert len(parameter_groups(model, layer_decay=1.0, weight_decay=0.1, decay="all")) == 1
    with pytest.raises(TrainingError, match=r"layer_decay: got 0\.5 for a tower without numbered blocks"):
        parameter_groups(Classifier(nn.Linear(2, 2), 2, 2), layer_decay=0.5, weight_decay=0.1, decay="all")


def test_the_loss_after_mixup_is_cross_entropy_with_mixed_targets():
    logits, labels, others = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 0, 3, 2, 0, 4])
    one_hot = functional.one_hot(labels, 5) * 0.7 + functional.one_hot(others, 5) * 0.3
    target = one_hot * 0.9 + 0.1 / 5
    found = CrossEntropy(label_smoothing=0.1)(nn.Identity(), (logits, labels, others, torch.full((6,), 0.7)))
    torch.testing.assert_close(found, functional.cross_entropy(logits, target))


class Tower(nn.Module):
    """A tower that compiles in seconds."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(3 * 32 * 32, 16)

    def forward(self, images):
        return self.proj(images.flatten(1)).tanh()


def test_a_compiled_run_takes_the_same_steps_up_to_rounding():
    def trained(**changes):
        torch.manual_seed(0)
        model = Classifier(Tower(), 24, 16)
        new_run(model, examples(), RECIPE.model_copy(update=changes), preprocess=TINY_PREPROCESS, seed=0).train()
        return model.state_dict()

    plain, compiled = trained(), trained(compile=True)
    assert plain.keys() == compiled.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-5)


def test_recipes_of_the_literature_can_be_written_as_params():
    common = {"crop_scale": (0.9, 1.0), "clip_norm": 1.0, "weight_decay": 0.1}
    FinetuneParams(**common, epochs=10, batch_size=512, lr=3e-5, warmup_steps=500, label_smoothing=0.0)  # WiSE-FT
    soups = {"mixup": 0.2, "rand_augment_operations": 2, "rand_augment_magnitude": 10, "head_first_epochs": 1}
    FinetuneParams(**common, **soups, epochs=8, batch_size=256, lr=2e-5, warmup_steps=500, label_smoothing=0.1)


def test_a_run_needs_nothing_but_a_model_batches_and_a_loss():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "scale": 1.0}], lr=1.0)
    data = (torch.ones(2, 1), torch.ones(2, 1))
    run = Run(
        name="linear",
        model=model,
        optimizer=optimizer,
        objective=lambda m, batch: (m(batch[0]) - batch[1]).square().mean(),
        schedule=lambda step: 0.25,
        batches=lambda start, stop: (data for _ in range(start, stop)),
        seed=0,
        steps=4,
        clip_norm=100.0,
    )
    run.train()
    # w <- w - 0.25 * 2 (w - 1) halves the distance to 1 at every step.
    assert model.weight.item() == pytest.approx(1 - 0.5**4)
