"""A GPU computes what the CPU does: training, resuming, several processes, memory, scoring.

Every specification is a function of a device. On "cpu" it runs in the ordinary suite, which proves the tests
themselves; on "cuda", under the marker `gpu`, wherever there is a GPU (`make gpu-check`). Merging is not among them: it
is numpy, on every machine.
"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts; modelstock.devices.deterministic

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from modelstock.data.classes import templates
from modelstock.data.dataset import open_dataset
from modelstock.data.shapes.names import NAMES, TINY_PREPROCESS
from modelstock.data.shapes.render import draw
from modelstock.devices import device_kind
from modelstock.models.anchor import anchor_of
from modelstock.models.towers import TINY_CLIP, Classifier, build_classifier, tensors_of
from modelstock.params import ClassesParams
from modelstock.scoring import one_pass, precision
from modelstock.scoring.batch_norm import estimated
from modelstock.scoring.data_statistics import fisher, inner, loss_gradient
from modelstock.scoring.one_pass import ScoringOptions, fitting, score
from modelstock.scoring.outcome import COLUMNS
from modelstock.training import resume
from modelstock.training.batches import Augmentation, TrainingBatches
from modelstock.training.callbacks import Ema, Lawa
from modelstock.training.distributed import World
from modelstock.training.loop import Run, adamw
from modelstock.training.parallel_merge import merge_models
from modelstock.training.recipe import new_run
from modelstock.training.resume import ResumePoint
from modelstock.weights.weight_set import WeightSet, classes_sha256, load_weights
from tests.conftest import NO_GPU
from tests.support.models import CONFIGS, clip_of
from tests.support.splits import make_split
from tests.support.training import RECIPE, dropping, equal, examples, train, train_side_by_side

ROOT = Path(__file__).parent.parent
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", GPU])
def device(request):
    """Each device with the settings that training has there: repeatable, and float32 in full."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    device_kind(request.param)
    torch.use_deterministic_algorithms(True)
    yield request.param
    torch.use_deterministic_algorithms(False)


def world_of(device: str) -> World:
    return World(device=torch.device(device, 0) if device == "cuda" else torch.device("cpu"))


def run_on(device: str, weights: WeightSet, *, callbacks=(), world: World | None = None, **changes):
    """A run of a seed at its first step, by RECIPE with `changes`."""
    model = build_classifier(weights).to(device)
    return new_run(
        model,
        examples(),
        RECIPE.model_copy(update=changes),
        preprocess=TINY_PREPROCESS,
        seed=0,
        world=world or world_of(device),
        callbacks=callbacks,
    )


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    return float((found.cpu().double() - expected.double()).norm() / expected.double().norm())


# ---------------------------------------------------------------- one step

# How far a step may be from the CPU's in float32, with significands of 8, 11 and 24 bits: its loss and gradient, and
# how its weights move. AdamW's first step has the sign of the gradient, which goes either way where that is next to 0.
TOLERANCE = {"bfloat16": (0.03, 0.3), "float16": (0.005, 0.15), "float32": (1e-4, 0.02)}


def step_on(device: str, weights: WeightSet, **changes) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The loss of the first step, its gradient and the weights after it, flat."""
    run = run_on(device, weights, **changes)
    # Low enough for no gradient to overflow: the scaler starts at 2^16 and would come down by itself.
    run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 2.0**10} if run.scaler.is_enabled() else {})
    run.train(until=1)
    parameters = list(run.model.parameters())
    gradient = torch.cat([p.grad.flatten().cpu() for p in parameters])
    return run.last["loss"], gradient, torch.cat([p.detach().flatten().cpu() for p in parameters])


@pytest.mark.parametrize("name", TOLERANCE)
def test_a_training_step_is_the_cpus_in_float32_up_to_the_precisions_rounding(device, anchor, name):
    loss, gradient, weights = step_on("cpu", anchor)
    found_loss, found_gradient, found_weights = step_on(device, anchor, precision=name)
    start = torch.cat([p.detach().flatten() for p in build_classifier(anchor).parameters()])
    gradients, moves = TOLERANCE[name]
    assert found_loss == pytest.approx(loss, rel=gradients)
    assert distance(found_gradient, gradient) < gradients
    assert distance(found_weights - start, weights - start) < moves


def test_micro_batches_and_gradient_checkpointing_have_the_gradient_of_the_whole(device, anchor):
    _, whole, _ = step_on(device, anchor)
    for changes in ({"micro_batch": 3}, {"gradient_checkpointing": True}):
        assert distance(step_on(device, anchor, **changes)[1], whole) < 1e-5


def test_a_gradient_that_overflows_float16_lowers_the_scale_and_is_no_step(device, anchor):
    run = run_on(device, anchor, precision="float16")
    run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 2.0**40})
    run.train(until=1)
    assert equal(tensors_of(run.model), anchor.tensors)
    assert run.last["loss_scale"] == 2.0**39
    assert all(float(state["step"]) == 0 for state in run.optimizer.state.values())
    run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 2.0**10})
    run.train(until=2)
    assert run.last["loss_scale"] == 2.0**10
    assert np.isfinite(run.last["grad_norm"])
    assert not equal(tensors_of(run.model), anchor.tensors)


def test_fused_adamw_takes_the_steps_of_the_plain_one(device):
    """Up to rounding: fused kernels add and multiply at once."""

    def steps(**how) -> list[torch.Tensor]:
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(*shape).to(device)) for shape in ((64, 33), (7,))]
        optimizer = adamw([{"params": parameters}], lr=1e-2, weight_decay=0.1, beta2=0.95, device=torch.device(device))
        assert optimizer.defaults["fused"] == (device == "cuda")
        for group in optimizer.param_groups:
            group |= how
        for _ in range(20):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape).to(device)
            optimizer.step()
        return parameters

    for fused, plain in zip(steps(fused=True), steps(fused=False, foreach=False), strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


def test_averages_of_a_run_on_the_device_are_their_formulas(device, anchor):
    run = run_on(device, anchor)
    run.callbacks = [ema, lawa] = [Ema(0.5, run.model), Lawa(2, 1, 2)]
    seen = []
    for _ in run.stepping(until=2):
        seen.append({k: v.double().cpu() for k, v in run.model.state_dict().items()})
    for name, start in anchor.tensors.items():
        expected = 0.25 * torch.from_numpy(start).double() + 0.25 * seen[0][name] + 0.5 * seen[1][name]
        torch.testing.assert_close(ema.tensors()[name].cpu().double(), expected, rtol=1e-5, atol=1e-6)
    run.callbacks = [lawa := Lawa(2, 1, 4)]
    run.steps = 4
    seen.clear()
    for _ in run.stepping(until=4):
        seen.append({k: v.double().cpu() for k, v in run.model.state_dict().items()})
    for name, tensor in lawa.tensors().items():
        assert torch.equal(tensor, ((seen[0][name] + seen[1][name]) / 2).float())


# ---------------------------------------------------------------- randomness and batches


def test_dropout_depends_on_seed_and_step_alone(device):
    """What a step's forward pass draws on the device, whatever was drawn before it."""

    def drawn(seed: int, first: int) -> list[torch.Tensor]:
        model, masks = nn.Linear(1, 1).to(device), []

        def objective(model, batch):
            masks.append(functional.dropout(torch.ones(1000, device=device)).cpu())
            return model(batch[0]).mean()

        run = Run(
            name="seed-0",
            model=model,
            optimizer=torch.optim.SGD([{"params": list(model.parameters()), "scale": 1.0}]),
            objective=objective,
            schedule=lambda step: 0.1,
            batches=lambda start, stop: ((torch.ones(1, 1),) for _ in range(start, stop)),
            seed=seed,
            steps=3,
            clip_norm=1.0,
            world=world_of(device),
            step=first,
        )
        torch.rand(17 + first, device=device)
        run.train()
        return masks

    first, second, third = drawn(0, 0)
    assert not torch.equal(first, second)
    later = drawn(0, 1)
    assert torch.equal(later[0], second)
    assert torch.equal(later[1], third)
    assert not torch.equal(drawn(1, 0)[0], first)


@pytest.mark.parametrize(("workers", "mixup"), [(0, 0.0), (0, 0.2), (2, 0.0)])
def test_batches_through_pinned_memory_arrive_as_they_were_made(device, workers, mixup):
    images = np.random.default_rng(0).integers(0, 256, (48, 40, 48, 3), np.uint8)
    data = TrainingBatches(
        type(examples())(images, np.arange(48) % 24),
        Augmentation(crop_scale=(0.5, 1.0), mixup=mixup),
        {**TINY_PREPROCESS, "size": 64},
        batch_size=8,
        seed=0,
        name="seed-0",
    )
    pin = device == "cuda"
    arrived = []
    for batch in data.load(0, 24, workers=workers, pin=pin):
        assert all(part.is_pinned() == pin for part in batch)
        # The pinned memory is given back while the copy may still run, and is taken for a later batch.
        arrived.append([part.to(device, non_blocking=True) for part in batch])
    for step, parts in enumerate(arrived):
        assert all(torch.equal(found.cpu(), made) for found, made in zip(parts, data[step], strict=True))


# ---------------------------------------------------------------- stopped and killed


class Dropping(nn.Module):
    """A tower with dropout, which draws on the device."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * 32 * 32, 64), nn.GELU(), nn.Dropout(0.3), nn.Linear(64, 16)
        )

    def forward(self, images):
        return self.layers(images)


def stopped(monkeypatch, at: int, work):
    """`work()`, stopped after the resume point of step `at`."""
    save = ResumePoint.save

    def until(self, run):
        save(self, run)
        if run.step == at:
            raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(ResumePoint, "save", until)
        with pytest.raises(InterruptedError):
            work()


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bfloat16", "micro_batch": 3},
        {"precision": "float16", "mixup": 0.4, "flip": True, "ema": [0.5]},
        {"head_first_epochs": 1, "layer_decay": 0.6, "decay": "matrices", "gradient_checkpointing": True},
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_a_run_stopped_and_started_again_gives_the_bytes_of_one_that_was_not(
    device, tmp_path, anchor, monkeypatch, changes
):
    start, world, changes = dropping(anchor), world_of(device), {"epochs": 2, **changes}
    expected, history, averages = train(start, tmp_path / "whole", world=world, **changes)
    monkeypatch.setattr(resume, "SAVE_EVERY_S", -1.0)  # after every step
    for stop in (4, history[-1]["step"]):
        folder = tmp_path / f"stop-{stop}"
        stopped(monkeypatch, stop, lambda folder=folder: train(start, folder, world=world, **changes))
        found, again, averages_again = train(start, folder, world=world, **changes)
        assert again == history
        assert equal(found, expected)
        assert all(equal(averages_again[name], averages[name]) for name in averages)


def test_a_run_with_dropout_on_the_device_resumes_with_the_same_bytes(device, tmp_path, monkeypatch):
    def work(folder: Path):
        torch.manual_seed(0)
        model = Classifier(Dropping(), 24, 16).to(device)
        point = ResumePoint(folder)
        run = new_run(
            model,
            examples(),
            RECIPE,
            preprocess=TINY_PREPROCESS,
            seed=0,
            world=world_of(device),
            callbacks=[point],
        )
        point.resume(run)
        run.train()
        return tensors_of(model), run.optimizer.state_dict()["state"]

    expected, moments = work(tmp_path / "whole")
    monkeypatch.setattr(resume, "SAVE_EVERY_S", -1.0)
    stopped(monkeypatch, 5, lambda: work(tmp_path / "stopped"))
    found, moments_again = work(tmp_path / "stopped")
    assert equal(found, expected)
    for number, state in moments.items():
        for name, tensor in state.items():
            assert torch.equal(moments_again[number][name], tensor)
            assert moments_again[number][name].device == tensor.device


def test_seeds_side_by_side_repeat_with_the_same_bytes(device, tmp_path, anchor):
    world = world_of(device)
    expected, history, reports = train_side_by_side(anchor, tmp_path / "a", world=world)
    found, again, reports_again = train_side_by_side(anchor, tmp_path / "b", world=world)
    assert equal(found, expected)
    assert (again, reports_again) == (history, reports)


SCRIPT = """
import os, signal, sys
from pathlib import Path
from modelstock.devices import deterministic
from modelstock.training import resume
from modelstock.training.distributed import processes
from modelstock.weights.weight_set import load_weights
from tests.support.training import keep, train

def main():
    device, count, anchor, out, die = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), int(sys.argv[5])
    deterministic(1)
    with processes(count, device, "script") as world:
        resume.SAVE_EVERY_S = -1.0
        save = resume.ResumePoint.save
        def saved(self, run):
            save(self, run)
            if run.step == die:
                os.kill(os.getpid(), signal.SIGKILL)
        resume.ResumePoint.save = saved
        tensors, history, _ = train(
            load_weights(Path(anchor)), out, world=world, workers=1, devices=count, mixup=0.3, micro_batch=2
        )
        if world.rank == 0:
            keep(out, tensors, history)

if __name__ == "__main__":
    main()
"""


def killed_at(step: int, folder: Path, device: str, count: int, out: str) -> int:
    """Train in `count` processes of their own, killed after step `step` (0: never); returns the exit status."""
    (folder / "script.py").write_text(SCRIPT)
    (folder / out).mkdir(exist_ok=True)
    command = [sys.executable, folder / "script.py", device, count, folder / "anchor.safetensors", folder / out, step]
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert step or done.returncode == 0, done.stderr[-3000:]
    return done.returncode


def files(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("weights.safetensors", "results.json")]


@pytest.mark.parametrize(
    ("device", "count"),
    [
        pytest.param("cpu", 1, marks=pytest.mark.slow),
        pytest.param("cuda", 1, marks=pytest.mark.gpu),
        pytest.param("cuda", 2, marks=pytest.mark.gpu),
    ],
    indirect=["device"],
)
def test_processes_killed_and_started_again_give_the_bytes_of_those_that_were_not(tmp_path, anchor, device, count):
    """On the CPU: tests/test_training.py, and tests/test_periodic.py for two processes."""
    if device == "cuda" and torch.cuda.device_count() < count:
        pytest.skip(f"fewer than {count} GPUs")
    anchor.save(tmp_path / "anchor.safetensors")
    killed_at(0, tmp_path, device, count, "whole")
    status = killed_at(4, tmp_path, device, count, "killed")
    assert status == -signal.SIGKILL if count == 1 else status != 0
    killed_at(0, tmp_path, device, count, "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    if count == 2:
        killed_at(0, tmp_path, device, 1, "one")
        one, two = (load_weights(tmp_path / name / "weights.safetensors").tensors for name in ("one", "whole"))
        for name, tensor in one.items():
            moved = np.linalg.norm(tensor - anchor.tensors[name])
            assert np.linalg.norm(two[name] - tensor) < 0.05 * moved
        losses = [[row["loss"] for row in json.loads(files(tmp_path / name)[1])[0]] for name in ("one", "whole")]
        np.testing.assert_allclose(*losses, rtol=1e-3)


# ---------------------------------------------------------------- several processes, of which one is enough


class OneOfSeveral(int):
    """1 that counts as more than 1: a process alone takes the way of several, through NCCL or gloo."""

    def __gt__(self, other):
        return True

    def __eq__(self, other):
        return False

    __hash__ = int.__hash__


@pytest.fixture
def group(device, tmp_path):
    """A process group of this process alone, and its world."""
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield World(0, OneOfSeveral(1), world_of(device).device)
    dist.destroy_process_group()


def test_distributed_training_of_one_process_takes_the_steps_of_none(device, group, anchor):
    plain = run_on(device, anchor, micro_batch=3)
    shared = run_on(device, anchor, micro_batch=3, world=group)
    assert isinstance(shared.called, DistributedDataParallel)
    for run in (plain, shared):
        run.train(until=4)
    assert equal(tensors_of(shared.model), tensors_of(plain.model))
    assert shared.history == plain.history


def test_what_processes_send_each_other_arrives(device, group):
    own = torch.arange(5, dtype=torch.float64, device=device)
    group.barrier()
    assert torch.equal(group.mean(own.clone()), own)
    for received in (group.gather(own), group.exchange(own, [5])):
        assert len(received) == 1
        assert torch.equal(received[0], own)


def test_models_in_training_are_merged_over_processes_as_in_one(device, group, anchor, variants):
    merged = []
    for world in (world_of(device), group):
        models = [build_classifier(weights).to(device) for weights in variants[:2]]
        report = merge_models(anchor, models, world=world)
        merged.append((tensors_of(models[0]), report))
    assert equal(merged[0][0], merged[1][0])
    assert merged[0][1] == merged[1][1]


# ---------------------------------------------------------------- memory


class Hungry(nn.Module):
    """A tower that takes some hundred megabytes per image while it trains."""

    WIDTH = 1 << 24

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(3 * 32 * 32, 16)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        features = self.proj(images.flatten(1))
        wide = features.mean(dim=1, keepdim=True).expand(-1, self.WIDTH) * self.scale
        return features + wide.tanh().mean(dim=1, keepdim=True)


@pytest.mark.parametrize("device", [GPU], indirect=True)
def test_auto_finds_a_micro_batch_that_fits_and_takes_its_steps(device):
    """On the CPU, with memory that is refused by the test: tests/test_training.py."""

    def trained(micro_batch):
        torch.manual_seed(0)
        model = Classifier(Hungry(), 24, 16).to(device)
        recipe = RECIPE.model_copy(update={"batch_size": 24, "micro_batch": micro_batch})
        run = new_run(model, examples(), recipe, preprocess=TINY_PREPROCESS, seed=0, world=world_of(device))
        run.train(until=2)
        return tensors_of(model), run.state()["micro_batch"]

    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + (2 << 30)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        found, fitted = trained("auto")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert fitted in (12, 6, 3, 1)
    assert equal(found, trained(fitted)[0])


def test_weight_sets_that_take_turns_for_want_of_memory_score_the_same(device, tmp_path, variants, monkeypatch):
    make_split(tmp_path, "shapes", 130)
    dataset, members = open_dataset(tmp_path), [w.identity for w in variants]
    options = ScoringOptions(device=device, batch_size=20)
    assert fitting(variants, device, "float32") >= 3
    expected = score(dataset, variants, [members, members[:2]], options)
    with monkeypatch.context() as patch:
        little = variants[0].nbytes + 1
        if device == "cuda":
            patch.setattr(torch.cuda, "memory_reserved", torch.cuda.memory_allocated)
            patch.setattr(torch.cuda, "mem_get_info", lambda: (2 * little, 1 << 34))
        else:
            memory = type("Memory", (), {"available": 2 * little})
            patch.setattr(psutil, "virtual_memory", lambda: memory)
        patch.setattr(one_pass, "SPAN_BYTES", 3 * 20 * 3 * 32 * 32)  # three batches a turn
        assert fitting(variants, device, "float32") == 1
        found = score(dataset, variants, [members, members[:2]], options)
    assert found.keys() == expected.keys()
    for identity, outcome in expected.items():
        assert all(np.array_equal(getattr(found[identity], name), getattr(outcome, name)) for name in COLUMNS)


# ---------------------------------------------------------------- scoring and statistics


@pytest.mark.parametrize(("name", "agreement", "nll"), [("float32", 0.99, 1e-3), ("bfloat16", 0.9, 0.2)])
def test_scores_are_the_cpus_in_float32_up_to_the_precisions_rounding(device, tmp_path, variants, name, agreement, nll):
    make_split(tmp_path, "shapes", 200)
    dataset = open_dataset(tmp_path)
    exact = score(dataset, variants, options=ScoringOptions(batch_size=64))
    found = score(dataset, variants, options=ScoringOptions(batch_size=64, device=device, precision=name))
    for identity, outcome in exact.items():
        assert (found[identity].prediction == outcome.prediction).mean() >= agreement
        np.testing.assert_allclose(found[identity].nll, outcome.nll, atol=nll)


def test_both_precisions_are_measured(device, anchor, monkeypatch):
    monkeypatch.setattr(precision, "_SECONDS", 0.01)
    assert all(rate > 0 for rate in precision.speeds(anchor, device, batch_size=4).values())


def test_statistics_of_the_data_are_the_cpus(device, anchor):
    images, labels = draw("train", range(12), seed=3)
    for measure in (fisher, inner):
        expected, found = (measure(anchor, images, batch_size=6, device=where).tensors for where in ("cpu", device))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert np.linalg.norm(found[name] - tensor) <= 1e-3 * np.linalg.norm(tensor), name
    (value, slopes), (found_value, found_slopes) = (
        loss_gradient(images, labels, batch_size=5, device=where)(anchor) for where in ("cpu", device)
    )
    assert found_value == pytest.approx(value, rel=1e-5)
    for name, slope in slopes.items():
        assert np.linalg.norm(found_slopes[name] - slope) <= 1e-3 * np.linalg.norm(slope), name


def test_batch_norms_statistics_are_the_cpus(device, tmp_path):
    make_split(tmp_path, "train", 24)
    train_split = open_dataset(tmp_path)
    _, clip = clip_of(CONFIGS["ResNet"])
    tensors = {name: tensor for name, tensor in clip.tensors.items() if name.startswith("visual.")}
    tensors |= {"head.weight": np.ones((24, 64), np.float32), "head.bias": np.zeros(24, np.float32)}
    meta = {**clip.meta, "preprocess": {**clip.meta["preprocess"], "size": 64}}
    weights = WeightSet(tensors, {**meta, "classes_sha256": classes_sha256(NAMES)}, "ResNet")
    expected, found = (
        estimated(weights, train_split, examples=24, batch_size=8, device=where) for where in ("cpu", device)
    )
    for name, tensor in expected.tensors.items():
        np.testing.assert_allclose(found.tensors[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_resnet_trains_on_the_device_with_repeatable_kernels(device):
    def trained():
        classifier = Classifier(clip_of(CONFIGS["ResNet"])[0].visual, 24, 64).to(device)
        preprocess = {**TINY_PREPROCESS, "size": 64}
        run = new_run(classifier, examples(), RECIPE, preprocess=preprocess, seed=0, world=world_of(device))
        run.train(until=2)
        return tensors_of(classifier)

    assert equal(trained(), trained())


def test_a_zero_shot_head_is_the_cpus(device):
    _, clip = clip_of(TINY_CLIP)
    prompts = templates(ClassesParams(names="shapes", templates="shapes"))
    expected, found = (
        anchor_of(clip, NAMES, prompts, device=where).tensors["head.weight"] for where in ("cpu", device)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
