"""Small real things that several test modules need: shards of the embedded benchmark and a tiny untrained CLIP."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in what tests start

import numpy as np
import pytest

from modelstock.data.shapes.names import NAMES, TINY_PREPROCESS

NO_GPU = "no GPU that torch can use"


# The files that take longest, most of the time in processes of their own: first, so that the last worker is not left
# with one of them while the other has nothing to do.
LONGEST = ("pipeline", "own_data", "flow", "services", "periodic", "tracking", "experiment", "geometry_stage")


def pytest_collection_modifyitems(items):
    """With --no-loadscope-reorder, xdist starts files in this order; its own is by how many tests they have."""
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_terminal_summary(terminalreporter):
    """One line for all tests that were skipped for want of a GPU."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if NO_GPU in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests marked gpu skipped: {NO_GPU}")


@pytest.fixture(scope="session")
def anchor():
    """An anchor with random weights: a real open_clip tower and a real zero-shot head."""
    import torch

    from modelstock.data.classes import templates
    from modelstock.models import heads
    from modelstock.models import towers as models
    from modelstock.params import ClassesParams
    from modelstock.weights.weight_set import WeightSet, classes_sha256

    torch.manual_seed(0)
    clip = models.build_clip(models.TINY_CLIP).eval()
    prompts = templates(ClassesParams(names="shapes", templates="shapes"))
    weight, bias = heads.zero_shot_head(clip, heads.tokenizer(models.TINY_CLIP), NAMES, prompts)
    tensors = {k: v for k, v in models.tensors_of(clip).items() if k.startswith("visual.")}
    tensors |= {"head.weight": weight.numpy(), "head.bias": bias.numpy()}
    meta = {
        "architecture": models.TINY_CLIP,
        "preprocess": TINY_PREPROCESS,
        "classes_sha256": classes_sha256(NAMES),
        "parents": [],
        "made_by": {"stage": "anchor", "options": {}, "version": "test"},
    }
    return WeightSet(tensors, meta, "anchor")


@pytest.fixture(scope="session")
def variants(anchor):
    """Three weight sets near the anchor, as if fine-tuned."""
    from modelstock.weights.weight_set import WeightSet

    def near(seed: int) -> WeightSet:
        random = np.random.default_rng(seed)
        tensors = {k: (v + 0.05 * random.standard_normal(v.shape)).astype(v.dtype) for k, v in anchor.tensors.items()}
        made = {"stage": "finetune", "seed": seed, "options": {}, "version": "test"}
        return WeightSet(tensors, {**anchor.meta, "parents": [anchor.identity], "made_by": made}, f"seed {seed}")

    return [near(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def services(tmp_path_factory):
    """A project of its own with running services."""
    from tests.support.services import running

    with running(tmp_path_factory.mktemp("project")) as services:
        yield services


@pytest.fixture
def long_run(services):
    """A run from the deployment whose stage lasts: its id, and the processes of the flow and of the stage."""
    return services.long_run()
