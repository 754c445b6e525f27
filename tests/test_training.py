"""Training: the schedule by hand, batches that cover each epoch, and runs that resume bit for bit after kill -9."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from modelstock import training
from modelstock.errors import TrainingError
from modelstock.models import build_classifier, tensors_of
from modelstock.params import load_params
from modelstock.training import (
    batch_rows,
    finetune,
    learning_rate,
    random_resized_crops,
    shared_positives_loss,
    top1,
)

ROOT = Path(__file__).parent.parent
RECIPE = load_params(ROOT / "params.yaml").finetune.model_copy(
    update={"batch_size": 8, "epochs": 3, "warmup_steps": 2, "log_every": 1}
)


def test_the_schedule_by_hand():
    rates = [learning_rate(s, peak=1.0, warmup=2, steps=6) for s in range(7)]
    np.testing.assert_allclose(rates, [0.5, 1.0, 1.0, 0.5 + 0.25 * 2**0.5, 0.5, 0.5 - 0.25 * 2**0.5, 0], atol=1e-12)


def test_an_epoch_visits_every_example_once_and_epochs_and_seeds_differ():
    def epoch(number, seed):
        return np.concatenate([batch_rows(number * 5 + i, count=20, batch_size=4, seed=seed) for i in range(5)])

    assert sorted(epoch(0, 1)) == list(range(20))
    assert not np.array_equal(epoch(0, 1), epoch(1, 1))
    assert not np.array_equal(epoch(0, 1), epoch(0, 2))


def test_crops_keep_the_size_and_a_full_crop_is_the_image():
    torch.manual_seed(0)
    images = torch.rand(4, 3, 32, 32)
    assert random_resized_crops(images, (0.5, 0.6)).shape == images.shape
    square = random_resized_crops(images, (0.9, 1.0))
    assert not torch.equal(square, images)


def test_shared_positives_loss_equals_plain_contrast_where_classes_differ_and_its_floor_where_they_agree():
    image, text = (functional.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    scale = torch.tensor(7.0)
    logits, own = scale * image @ text.T, torch.arange(5)
    plain = (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(shared_positives_loss(image, text, own, scale), plain)
    same = torch.zeros(5, dtype=torch.long)
    flat = image[:1].repeat(5, 1)
    torch.testing.assert_close(shared_positives_loss(flat, flat, same, scale), torch.tensor(5.0).log())


def data(count: int = 24):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % 24


def test_a_seed_trained_twice_gives_the_same_bytes_and_another_seed_others(tmp_path, anchor):
    def train(seed, name):
        model = build_classifier(anchor)
        history = finetune(model, data(), data(), RECIPE, seed=seed, folder=tmp_path / name)
        return tensors_of(model), history

    (first, history), (second, again), (other, _) = train(0, "a"), train(0, "b"), train(1, "c")
    assert all(np.array_equal(first[k], second[k]) for k in first)
    assert history == again
    assert not np.array_equal(first["head.weight"], other["head.weight"])
    assert [row["step"] for row in history] == list(range(1, 10))
    assert [row["step"] for row in history if "validation/top1" in row] == [3, 6, 9]
    assert history[-1]["loss"] < history[0]["loss"]


def test_a_run_stopped_after_any_step_and_started_again_gives_the_same_bytes(tmp_path, anchor, monkeypatch):
    whole = build_classifier(anchor)
    history = finetune(whole, data(), data(), RECIPE, seed=0, folder=tmp_path / "whole")
    expected = tensors_of(whole)
    monkeypatch.setattr(training, "SAVE_EVERY_S", -1.0)  # after every step
    for stop in (1, 4, 8):
        steps = iter(range(stop))

        def crop(images, scale, steps=steps):
            if next(steps, None) is None:
                raise InterruptedError
            return random_resized_crops(images, scale)

        with monkeypatch.context() as patch:
            patch.setattr(training, "random_resized_crops", crop)
            with pytest.raises(InterruptedError):
                finetune(build_classifier(anchor), data(), data(), RECIPE, seed=0, folder=tmp_path / f"stop-{stop}")
        resumed = build_classifier(anchor)
        assert finetune(resumed, data(), data(), RECIPE, seed=0, folder=tmp_path / f"stop-{stop}") == history
        found = tensors_of(resumed)
        assert all(np.array_equal(found[k], expected[k]) for k in expected)


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_rate(tmp_path, anchor):
    images, labels = data()
    images[3] = float("nan")
    with pytest.raises(TrainingError, match=r"seed-0, step \d+: got loss nan, .* at learning rate .*last resume point"):
        finetune(build_classifier(anchor), (images, labels), data(), RECIPE, seed=0, folder=tmp_path)


def test_fewer_examples_than_a_batch_are_refused(tmp_path, anchor):
    with pytest.raises(TrainingError, match=r"finetune\.batch_size: got 8; expected at most the 4 training images"):
        finetune(build_classifier(anchor), data(4), data(), RECIPE, seed=0, folder=tmp_path)


def test_top1_by_hand():
    model = torch.nn.Flatten()
    images = torch.eye(3).reshape(3, 1, 1, 3)
    assert top1(model, images, torch.tensor([0, 1, 0])) == pytest.approx(2 / 3)


SCRIPT = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from test_training import RECIPE, data
from modelstock.models import build_classifier, tensors_of
from modelstock import training
from modelstock.training import finetune
from modelstock.weights import WeightSet, load_weights
torch.set_num_threads(1)
training.SAVE_EVERY_S = -1.0
anchor = load_weights(Path(sys.argv[1]))
model = build_classifier(anchor)
print("ready", flush=True)
recipe = RECIPE.model_copy(update={{"epochs": 20}})
history = finetune(model, data(), data(), recipe, seed=0, folder=Path(sys.argv[2]))
WeightSet(tensors_of(model), {{"history": history}}).save(Path(sys.argv[3]))
"""


def test_kill_9_at_random_moments_also_during_a_save_changes_no_byte(tmp_path, anchor):
    anchor.save(tmp_path / "anchor.safetensors")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))

    def start(name):
        command = [sys.executable, str(script), str(tmp_path / "anchor.safetensors"), str(tmp_path / name)]
        return subprocess.Popen(
            [*command, str(tmp_path / f"{name}.safetensors")],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    assert start("whole").wait() == 0
    moments, kills = random.Random(0), 0
    for _ in range(5):
        process = start("killed")
        process.stdout.readline()
        time.sleep(moments.uniform(0.05, 1.0))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 3
    assert start("killed").wait() == 0
    assert (tmp_path / "killed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
