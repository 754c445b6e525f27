"""Nothing that could change a bit of a result is missing from its key: one change, another key."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelstock import devices, provenance
from modelstock.data.classes import templates
from modelstock.data.dataset import Dataset, open_dataset
from modelstock.data.manifest import make_manifest, read_manifest, save_manifest
from modelstock.data.shapes.names import NAMES
from modelstock.errors import DataError, WeightsError
from modelstock.merging.rules import RULES
from modelstock.models import anchor as anchors
from modelstock.models.towers import TINY_CLIP, build_clip, tensors_of
from modelstock.params import ClassesParams, FinetuneParams, PeriodicParams
from modelstock.scoring.one_pass import ScoringOptions, score
from modelstock.scoring.score_cache import ScoreCache
from modelstock.training import periodic
from modelstock.training.inputs import read_inputs
from modelstock.training.job import Job, Setting
from modelstock.weights.weight_set import WeightSet
from tests.support.splits import make_split
from tests.support.training import RECIPE, arm


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine whose facts tests can change."""
    facts = {"threads": 1, "model": "AVX2", "torch": "1.0"}
    monkeypatch.setattr(torch, "get_num_threads", lambda: facts["threads"])
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: facts["model"])
    monkeypatch.setattr(provenance, "_version", lambda library: facts.get(library, "0"))
    return facts


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> Mapping[str, Dataset]:
    folder = tmp_path_factory.mktemp("splits")
    for name, split, count in (("train", "train", 24), ("other", "train", 26), ("held-out", "held-out", 24)):
        make_split(folder / name, split, count)
    make_split(folder / "bordered", "train", 24)
    whole = read_manifest(folder / "bordered")
    facts = whole.model_dump(exclude={"sha256", "count", "shards"})
    save_manifest(folder / "bordered", make_manifest(**{**facts, "border": 2}, shards=whole.shards))
    return {name: open_dataset(folder / name) for name in ("train", "other", "held-out", "bordered")}


def otherwise(anchor: WeightSet, **metadata: Any) -> WeightSet:
    """The anchor's tensors with other metadata."""
    return WeightSet(anchor.tensors, {**anchor.meta, **metadata}, "otherwise")


def other_tensors(anchor: WeightSet) -> WeightSet:
    return WeightSet({**anchor.tensors, "head.bias": anchor.tensors["head.bias"] + 1}, anchor.meta, "other")


OTHER_PREPROCESS = {
    "mean": [0.4, 0.4, 0.4],
    "std": [0.3, 0.3, 0.3],
    "interpolation": "bilinear",
    "resize_mode": "squash",
}
OTHER_ARCHITECTURE = {"quick_gelu": True}

# ---------------------------------------------------------------- training


def training_key(
    inputs: Any,
    recipe: FinetuneParams = RECIPE,
    *,
    seed: int = 0,
    where: Setting | None = None,
    stage: str = "finetune",
) -> str:
    made_by = {"stage": stage, "seed": seed, "options": recipe.model_dump(mode="json")}
    code = "modelstock.training.finetune"
    return Job(name="a", made_by=made_by, code=code, facts=inputs.identities, setting=where or Setting()).key


TRAINING: dict[str, Callable[[Any], str]] = {
    "the anchor's tensors": lambda of: of(anchor=other_tensors),
    **{
        f"the anchor's preprocess: {name}": lambda of, name=name, value=value: of(
            anchor=lambda a: otherwise(a, preprocess={**a.meta["preprocess"], name: value})
        )
        for name, value in OTHER_PREPROCESS.items()
    },
    "the anchor's architecture": lambda of: of(
        anchor=lambda a: otherwise(a, architecture={**a.meta["architecture"], **OTHER_ARCHITECTURE})
    ),
    "the anchor's classes": lambda of: of(anchor=lambda a: otherwise(a, classes=["other names", *NAMES[1:]])),
    "the training data": lambda of: of(train="other"),
    "a border that is taken off": lambda of: of(train="bordered"),
    "the held-out data": lambda of: of(held_out="train"),
    "the seed": lambda of: of(seed=1),
    "the stage": lambda of: of(stage="longer"),
    "the number of threads": lambda of: of(where=Setting(threads=2)),
    "the CPU's instructions": lambda of: of(machine={"model": "AVX512"}),
    "the version of torch": lambda of: of(machine={"torch": "2.0"}),
    **{
        f"the recipe: {name}": lambda of, name=name, value=value: of(recipe=RECIPE.model_copy(update={name: value}))
        for name, value in {
            "epochs": 9, "batch_size": 4, "lr": 1e-5, "weight_decay": 0.3, "beta2": 0.9, "warmup_steps": 5,
            "clip_norm": 9.0, "precision": "bfloat16", "log_every": 3, "crop_scale": (0.5, 1.0), "flip": True,
            "rand_augment_operations": 1, "rand_augment_magnitude": 3, "mixup": 0.5, "label_smoothing": 0.3,
            "layer_decay": 0.5, "decay": "matrices", "train_head": False, "head_first_epochs": 1, "head_lr": 0.5,
            "micro_batch": 2, "gradient_checkpointing": True, "compile": True, "devices": 2, "ema": [0.7], "lawa": 3,
            "snapshots": True, "validate_every": 3, "schedule": "constant", "order_seed": 7, "share": 0.5,
        }.items()
    },
}  # fmt: skip


@pytest.fixture
def key_of_training(anchor, splits, machine):
    def of(anchor=anchor, train="train", held_out="held-out", machine_facts=machine, **changes):
        machine_facts.update(changes.pop("machine", {}))
        start = anchor if isinstance(anchor, WeightSet) else anchor(of.anchor)
        return training_key(read_inputs(start, splits[train], splits[held_out], in_memory=True), **changes)

    of.anchor = anchor
    return of


@pytest.mark.parametrize("change", TRAINING)
def test_a_training_is_kept_under_everything_that_changes_its_bytes(key_of_training, change):
    before = key_of_training()
    assert before == key_of_training()
    assert TRAINING[change](key_of_training) != before


def test_every_option_of_the_recipe_is_tried():
    tried = {name.removeprefix("the recipe: ") for name in TRAINING if name.startswith("the recipe: ")}
    assert tried == set(FinetuneParams.model_fields)


def test_what_changes_no_byte_keeps_the_key(anchor, splits):
    keys = {
        training_key(read_inputs(anchor, splits["train"], splits["held-out"], in_memory=in_memory), where=where)
        for in_memory in (True, False)
        for where in (Setting(), Setting(workers=2))
    }
    assert len(keys) == 1


def test_a_gpu_is_named_with_its_libraries(monkeypatch):
    names = iter(["H100", "A100"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: next(names))
    first, second = devices.device_model("cuda"), devices.device_model("cuda")
    assert first.startswith("H100, CUDA")
    assert first.partition(",")[2] == second.partition(",")[2]
    assert first != second


def test_periodic_merging_is_kept_under_all_its_options_but_how_many_share_the_work(monkeypatch, anchor, splits):
    keys = []
    monkeypatch.setattr(periodic, "train_periodic", lambda *a, folder, **k: (keys.append(folder.name), 1 / 0))
    inputs = read_inputs(anchor, splits["train"], splits["held-out"], in_memory=True)

    def key(rule="model_stock", *, seeds=(0, 1), recipe=RECIPE, name="test", **settings):
        merging = arm(rule, size=len(seeds), **settings)
        with pytest.raises(ZeroDivisionError):
            periodic.merge_periodically(
                inputs, recipe, merging, arm=name, seeds=seeds, setting=Setting(), out=Path("out")
            )
        return keys[-1]

    changes = {
        "model_stock": {"pairwise": "angle", "clip": "none"},
        "uniform": {},
        "warp": {"pull": 0.3, "toward": "anchor"},
        "papa": {"alpha": 0.5},
    }
    assert {rule: set(options) for rule, options in changes.items()} == {
        name: {option.name for option in rule.options} for name, rule in RULES.items()
    }
    different = [
        key(seeds=(0, 2)), key(seeds=(0, 1, 2)), key(recipe=RECIPE.model_copy(update={"lr": 1e-5})), key(every=0.5),
        key(reset_moments=True), key(name="other"), *(key(rule) for rule in changes),
        *(key(rule, **{name: value}) for rule, options in changes.items() for name, value in options.items()),
    ]  # fmt: skip
    assert set(PeriodicParams.model_fields) == {"rule", "size", "every", "reset_moments", "devices"}
    assert len(set(different)) == len(different)
    assert key(devices=2) == key()


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_labels_that_are_not_the_heads_classes_in_their_order_are_not_trained_on(anchor, splits, tmp_path, split):
    """Labels are places in the split's own list: 0, 1, 2 of a subset would be trained as the first three classes."""
    some = splits[split].manifest
    facts = some.model_dump(exclude={"sha256", "count", "shards"})
    swapped = {**facts, "label_groups": [[1], [0], *facts["label_groups"][2:]]}
    wrong = Dataset(splits[split].folder, make_manifest(**swapped, shards=some.shards))
    both = {**splits, split: wrong}
    with pytest.raises(DataError, match=r"24 labels that are not the 24 classes in their order; expected one class"):
        read_inputs(anchor, both["train"], both["held-out"], in_memory=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("label_groups", [[1], [0], *([i] for i in range(2, 24))]), ("role", "shift"), ("border", 3), ("benchmark", "b")],
)
def test_a_manifest_changed_after_it_was_written_is_refused_for_keys_go_by_its_sha256(splits, tmp_path, name, value):
    written = json.loads((splits["train"].folder / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**written, name: value}))
    with pytest.raises(DataError, match=r"manifest\.json: got a manifest that was changed after it was written"):
        read_manifest(tmp_path)


# ---------------------------------------------------------------- scores

SCORES: dict[str, Callable[[Any], Path]] = {
    "the tensors": lambda of: of(weights=other_tensors),
    **{
        f"the preprocess: {name}": lambda of, name=name, value=value: of(
            weights=lambda a: otherwise(a, preprocess={**a.meta["preprocess"], name: value})
        )
        for name, value in OTHER_PREPROCESS.items()
    },
    "the architecture": lambda of: of(
        weights=lambda a: otherwise(a, architecture={**a.meta["architecture"], **OTHER_ARCHITECTURE})
    ),
    "the data": lambda of: of(data="other"),
    "a border that is taken off": lambda of: of(data="bordered"),
    "the batch size": lambda of: of(options=ScoringOptions(batch_size=7)),
    "the precision": lambda of: of(options=ScoringOptions(precision="bfloat16")),
    "the device": lambda of: of(device="cuda"),
    "the number of threads": lambda of: of(machine={"threads": 2}),
    "the CPU's instructions": lambda of: of(machine={"model": "AVX512"}),
    "the version of torch": lambda of: of(machine={"torch": "2.0"}),
}


@pytest.mark.parametrize("change", SCORES)
def test_an_outcome_is_kept_under_everything_that_changes_its_bytes(anchor, splits, machine, monkeypatch, change):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")

    def of(weights=lambda a: a, data="train", options=ScoringOptions(), device="cpu", **changes):  # noqa: B008
        machine.update(changes.get("machine", {}))
        cache = ScoreCache(Path("cache"), splits[data].manifest.sha256, options.settings(device))
        return cache.path(cache.key(weights(anchor)))

    before = of()
    assert before == of(options=ScoringOptions(workers=3, resident=1))
    assert SCORES[change](of) != before


@pytest.mark.parametrize("change", ["preprocess", "architecture"])
def test_the_same_tensors_are_not_scored_in_two_ways_at_once(anchor, splits, change):
    """Outcomes go by the identity of tensors: one of the two would be shown for both."""
    new = {"preprocess": {"interpolation": "bilinear"}, "architecture": OTHER_ARCHITECTURE}[change]
    other = otherwise(anchor, **{change: {**anchor.meta[change], **new}})
    with pytest.raises(WeightsError, match=f"otherwise: got the tensors of anchor with another {change}"):
        score(splits["train"], [anchor, other])
    assert len(score(splits["train"], [anchor, otherwise(anchor, made_by={})])) == 1


def test_an_ensembles_logits_are_summed_in_one_order_however_its_members_are_named(anchor, variants, splits):
    members = [w.identity for w in variants]
    orders = [members, members[::-1], [members[1], members[0], members[2]]]
    ensembles = [{k: v for k, v in score(splits["train"], variants, [o]).items() if k not in members} for o in orders]
    (first,), *others = (list(e.values()) for e in ensembles)
    for (other,) in others:
        np.testing.assert_array_equal(first.nll, other.nll)


# ---------------------------------------------------------------- heads


def test_a_zero_shot_head_is_kept_under_everything_that_changes_its_bytes(machine, monkeypatch):
    torch.manual_seed(0)
    tensors = tensors_of(build_clip(TINY_CLIP))
    prompts = templates(ClassesParams(names="shapes", templates="shapes"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")

    def key(changed=None, architecture=TINY_CLIP, names=NAMES, prompts=prompts, device="cpu", **facts):
        machine.update({"threads": 1, "model": "AVX2", "torch": "1.0", **facts})
        now = {name: value + 1 if name == changed else value for name, value in tensors.items()}
        return anchors._head_key(WeightSet(now, {"architecture": architecture}), names, prompts, device)

    others = [
        key("logit_scale"), key("text_projection"), key("token_embedding.weight"), key(names=NAMES[::-1]),
        key(prompts=prompts[:1]), key(architecture={**TINY_CLIP, "quick_gelu": True}), key(device="cuda"),
        key(threads=2), key(model="AVX512"), key(torch="2.0"),
    ]  # fmt: skip
    assert len({key(), *others}) == 1 + len(others)
    assert key("visual.proj") == key()  # the image tower has no part in it
