"""What GPUs do otherwise than CPUs, held where there is none: whose tensors meet, how memory and rounding are met."""

import functools
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from modelstock.data.classes import templates
from modelstock.data.dataset import open_dataset
from modelstock.data.shapes.names import NAMES, TINY_PREPROCESS
from modelstock.data.shapes.render import draw
from modelstock.devices import deterministic, device_kind, device_model
from modelstock.errors import TrainingError
from modelstock.models.anchor import anchor_of
from modelstock.models.towers import TINY_CLIP, Classifier, build_classifier
from modelstock.params import ClassesParams
from modelstock.scoring import precision
from modelstock.scoring.batch_norm import estimated
from modelstock.scoring.data_statistics import fisher, inner, loss_gradient
from modelstock.scoring.one_pass import ScoringOptions, fitting, score
from modelstock.training import distributed
from modelstock.training.callbacks import Ema, Lawa
from modelstock.training.distributed import World, processes
from modelstock.training.loop import is_out_of_memory
from modelstock.training.parallel_merge import merge_models
from modelstock.training.recipe import new_run
from modelstock.training.validation import accuracy
from tests.support.models import clip_of
from tests.support.pretended_gpu import pretended_gpu
from tests.support.splits import make_split
from tests.support.training import RECIPE, child, dropping, examples

GPU = torch.device("cuda", 0)


# ---------------------------------------------------------------- tensors of two devices never meet


def in_a_process_of_its_own(test):
    """Autograd's threads for a GPU, also for one that is pretended, forbid any later fork of a process."""

    @functools.wraps(test)
    def forked(*arguments, **named):
        assert child(lambda: test(*arguments, **named)) == 0

    return forked


@in_a_process_of_its_own
def test_the_pretended_gpu_refuses_what_a_gpu_refuses():
    with pretended_gpu():
        there = torch.ones(2, 3, device="cuda")
        with pytest.raises(RuntimeError, match=r"two (different )?devices"):
            there @ torch.ones(3)
        with pytest.raises(TypeError, match="convert cuda"):
            there.numpy()
        assert there.cpu().numpy().shape == (2, 3)


def batches_of(*parts):
    """The same batch at every step."""
    return lambda start, stop: (parts for _ in range(start, stop))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bfloat16", "micro_batch": 3, "label_smoothing": 0.1},
        {"precision": "float16", "head_first_epochs": 1, "layer_decay": 0.6},
        {"micro_batch": "auto", "gradient_checkpointing": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("mixup", [False, True])
@in_a_process_of_its_own
def test_training_steps_with_averages_keep_to_one_device(anchor, changes, mixup):
    # The batches are of values, which are drawn on the CPU in any case.
    batch = [torch.zeros(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64)]
    batch += [torch.zeros(8, dtype=torch.int64), torch.full((8,), 0.5)] if mixup else []
    with pretended_gpu():
        model = build_classifier(dropping(anchor)).to("cuda")
        ema, lawa = Ema(0.9, model), Lawa(2, 1, 3)
        recipe = RECIPE.model_copy(update=changes)
        world = World(device=GPU)
        run = new_run(model, examples(), recipe, preprocess=TINY_PREPROCESS, seed=0, world=world, callbacks=[ema, lawa])
        assert run.optimizer.defaults["fused"]
        assert run.scaler.is_enabled() == (recipe.precision == "float16")
        run.batches = batches_of(*batch)
        run.train(until=3)
        averages = [*ema.tensors().values(), *lawa.tensors().values()]
        assert {tensor.device.type for tensor in ema.tensors().values()} == {"cuda"}
        assert all(tensor.cpu().numpy().size for tensor in averages)


@in_a_process_of_its_own
def test_validation_and_merging_in_training_keep_to_one_device(anchor):
    with pretended_gpu():
        models = [build_classifier(anchor).to("cuda") for _ in range(2)]
        merge_models(anchor, models, world=World(device=GPU))
        assert accuracy(models[0], examples(), TINY_PREPROCESS, GPU) >= 0


@in_a_process_of_its_own
def test_statistics_of_the_data_keep_to_one_device(anchor):
    images, labels = draw("train", range(12), seed=3)
    with pretended_gpu():
        for measure in (fisher, inner):
            assert measure(anchor, images, batch_size=6, device="cuda").tensors
        _, slopes = loss_gradient(images, labels, batch_size=5, device="cuda")(anchor)
        assert slopes.keys() == anchor.tensors.keys()


@in_a_process_of_its_own
def test_batch_norm_is_estimated_on_one_device(tmp_path, monkeypatch, anchor):
    make_split(tmp_path, "train", 20)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    train_split = open_dataset(tmp_path)
    with pretended_gpu():
        assert estimated(anchor, train_split, examples=10, batch_size=5, device="cuda").tensors


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@in_a_process_of_its_own
def test_scoring_keeps_to_one_device(tmp_path, variants, name):
    make_split(tmp_path, "shapes", 40)
    dataset, members = open_dataset(tmp_path), [w.identity for w in variants]
    with pretended_gpu():
        outcomes = score(dataset, variants, [members], ScoringOptions(device="cuda", batch_size=16, precision=name))
    assert [len(outcome) for outcome in outcomes.values()] == [40] * 4


@in_a_process_of_its_own
def test_the_precisions_are_measured_on_one_device(anchor, monkeypatch):
    monkeypatch.setattr(precision, "_SECONDS", 0.01)
    with pretended_gpu():
        assert precision.speeds(anchor, "cuda", batch_size=4).keys() == {"float32", "bfloat16"}


@in_a_process_of_its_own
def test_zero_shot_heads_are_made_on_one_device():
    _, clip = clip_of(TINY_CLIP)
    prompts = templates(ClassesParams(names="shapes", templates="shapes"))
    with pretended_gpu():
        assert anchor_of(clip, NAMES, prompts, device="cuda").tensors["head.weight"].shape == (24, 128)


# ---------------------------------------------------------------- rounding


def test_on_a_gpu_float32_is_float32_in_convolutions_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    device_kind("cpu")
    assert torch.backends.cudnn.allow_tf32
    device_kind("auto")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.conv.fp32_precision != "tf32"
    with torch.backends.cudnn.flags():  # which reads what is set, as torch.compile does
        pass


def test_results_with_another_workspace_of_cublas_are_kept_apart(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    names = set()
    for workspace in (":4096:8", ":16:8"):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
        names.add(device_model("cuda"))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    assert len(names | {device_model("cuda")}) == 3


@in_a_process_of_its_own
def test_lawa_divides_where_a_resumed_run_does(tmp_path, anchor):
    """A GPU multiplies by 1/3, which rounds otherwise than dividing by 3: both a whole and a resumed run divide."""
    with pretended_gpu():
        lawa = Lawa(3, 1, 3)
        lawa.load_state({"sum": {"head.bias": torch.ones(24, dtype=torch.float64, device="cuda")}, "count": 3})
        assert lawa.tensors()["head.bias"].device.type == "cpu"


def test_determinism_is_asked_of_cublas_before_it_starts(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    threads = torch.get_num_threads()
    try:
        deterministic(threads)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("stage", ["anchor", "evaluate", "merge", "pretrain"])
def test_stages_ask_for_determinism_before_they_look_for_a_device(stage):
    lines = (Path(__file__).parent.parent / "stages" / f"{stage}.py").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if "deterministic(params.threads)" in line)
    assert all(i > first for i, line in enumerate(lines) if "params.device" in line)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_a_gpus_libraries_refuse_memory_in_words_of_their_own(error, refused):
    assert is_out_of_memory(error) == refused


class Normed(nn.Module):
    """A tower with BatchNorm, and a layer behind it that has no room for more than `limit` images."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit, self.norm, self.proj = limit, nn.BatchNorm1d(3 * 32 * 32), nn.Linear(3 * 32 * 32, 16)

    def forward(self, images):
        normed = self.norm(images.flatten(1))
        if self.training and len(images) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return self.proj(normed)


def test_what_batch_norm_counts_does_not_depend_on_the_memory_that_is_free():
    def state(limit: int, micro_batch):
        torch.manual_seed(0)
        model = Classifier(Normed(limit), 24, 16)
        recipe = RECIPE.model_copy(update={"micro_batch": micro_batch})
        new_run(model, examples(), recipe, preprocess=TINY_PREPROCESS, seed=0).train(until=2)
        return model.state_dict()

    assert state(8, 2)["visual.norm.num_batches_tracked"] == 8
    with pytest.raises(TrainingError, match="got auto for a tower with BatchNorm"):
        state(3, "auto")


def test_what_torch_keeps_of_freed_memory_counts_as_free(monkeypatch, anchor):
    gigabyte = 1 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 16 * gigabyte))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 6 * gigabyte)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 4 * gigabyte)
    assert fitting([anchor], "cuda", "float32") == gigabyte // anchor.nbytes
    assert fitting([anchor], "cuda", "bfloat16") == gigabyte // (anchor.nbytes // 2)


def test_a_model_on_the_cpu_starts_up_no_gpu(tmp_path, monkeypatch, anchor):
    """Each GPU that is started up takes a process some hundred megabytes."""
    make_split(tmp_path, "train", 10)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: pytest.fail("a GPU was started up"))
    assert estimated(anchor, open_dataset(tmp_path), examples=10, device="cpu").tensors


# ---------------------------------------------------------------- several processes


def test_processes_that_it_starts_talk_over_the_loopback_alone(monkeypatch):
    for name in ("WORLD_SIZE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)

    class Started(Exception):
        pass

    def started(*_):
        raise Started

    monkeypatch.setattr(distributed.os, "execv", started)
    with pytest.raises(Started), processes(2, "cpu", "none"):
        pass
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == os.environ.pop("NCCL_SOCKET_IFNAME") == "lo"
