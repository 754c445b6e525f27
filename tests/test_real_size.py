"""A ViT-B/32 of real size with random weights, on a few hundred images of many sizes, by the preset's recipe."""

import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from modelstock.data.examples import InShards
from modelstock.data.shapes.names import NAMES
from modelstock.data.shapes.render import draw
from modelstock.data.shards import write_shards
from modelstock.merging import engine as merging
from modelstock.models.towers import build_classifier, build_clip, tensors_of
from modelstock.params import load_params
from modelstock.training import resume
from modelstock.training.finetune import finetune
from modelstock.training.parallel_merge import merge_models
from modelstock.training.resume import ResumePoint
from modelstock.weights.weight_set import WeightSet
from tests.support.training import equal
from tests.test_presets import composed

PREPROCESS = {"size": 224, "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"}


def shards(folder: Path, split: str, count: int) -> InShards:
    """Photographs' sizes: the embedded benchmark's pictures enlarged to 224 to 320 pixels a side."""
    small, labels = draw(split, range(count), seed=0)
    random = np.random.default_rng(0)
    images = []
    for image in small:
        height, width = random.integers(224, 321, 2)
        images.append(image[np.arange(height) * 32 // height][:, np.arange(width) * 32 // width])
    manifest = write_shards(
        folder,
        zip(images, labels, strict=True),
        benchmark=split,
        role=split,
        labels=list(NAMES),
        label_groups=[[i] for i in range(24)],
        classes=NAMES,
        shard_size=100,
    )
    return InShards(folder, manifest)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_vit_b_32_trains_by_its_preset_resumes_bit_for_bit_and_merges(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = open_clip.get_model_config("ViT-B-32-quickgelu")
    clip = build_clip(config)
    tensors = {k: v for k, v in tensors_of(clip).items() if k.startswith("visual.")}
    tensors |= {"head.weight": 0.05 * np.random.default_rng(0).standard_normal((24, 512), np.float32)}
    tensors |= {"head.bias": np.zeros(24, np.float32)}
    del clip
    anchor = WeightSet(tensors, {"architecture": config, "preprocess": PREPROCESS})
    assert sum(t.size for t in tensors.values()) > 87_000_000
    recipe = load_params(composed(tmp_path, "preset=vit-b-32")).finetune.model_copy(
        update={"batch_size": 64, "epochs": 1, "warmup_steps": 2, "micro_batch": 32, "log_every": 1, "lawa": 1}
    )
    train, held_out = shards(tmp_path / "train", "train", 256), shards(tmp_path / "held", "held-out", 48)

    def run(name: str, seed: int = 0):
        model = build_classifier(anchor)
        history, averages = finetune(
            model, train, held_out, recipe=recipe, preprocess=PREPROCESS, seed=seed, folder=tmp_path / name, workers=1
        )
        return model, history, averages

    whole, history, averages = run("whole")
    assert [row["step"] for row in history] == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss"]) for row in history)
    expected = tensors_of(whole)
    assert equal({k: v.numpy() for k, v in averages[1].tensors().items()}, expected)  # LAWA over one epoch

    with monkeypatch.context() as patch:
        patch.setattr(resume, "SAVE_EVERY_S", -1.0)
        save = ResumePoint.save

        def stop(self, run):
            save(self, run)
            if run.step == 2:
                raise InterruptedError

        patch.setattr(ResumePoint, "save", stop)
        with pytest.raises(InterruptedError):
            run("stopped")
    shutil.rmtree(tmp_path / "whole")
    resumed, again, _ = run("stopped")
    assert again == history
    assert equal(tensors_of(resumed), expected)
    del resumed

    other, _, _ = run("other", seed=1)
    tuned = [WeightSet(expected, anchor.meta, "0"), WeightSet(tensors_of(other), anchor.meta, "1")]
    merged, facts = merging.merge("model_stock", anchor, tuned)
    report = merge_models(anchor, [whole, other])
    assert equal(tensors_of(other), merged.tensors)
    assert report["visual.proj"]["ratio"] == facts["visual.proj"]["ratio"]
